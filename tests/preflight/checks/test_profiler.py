"""Checks of the device profiles, and what they resolve to."""

import pytest

from fixtures.tiny import write_tiny_model
from verl.config import PPOConfig
from verl.config.profiles import rollout_profiles, trainer_profiles
from verl.trainer.ppo.profiling import last_profiled

G = "global_profiler__"
A, REF, R = (f"actor_rollout_ref__{role}__profiler__" for role in ("actor", "ref", "rollout"))
ON = {f"{G}tool": "torch", f"{G}steps": [1, 2], f"{A}enable": True}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return {"actor_rollout_ref__model__path": write_tiny_model(tmp_path_factory.mktemp("tiny"))}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"{G}tool": "nsys"}, "global_profiler.tool=nsys: nsys is not supported; use torch"),
        ({f"{G}tool": "npu"}, "global_profiler.tool=npu: this run is on cpu; use torch"),
        ({f"{G}tool": "torch_memory"}, "global_profiler.tool=torch_memory: a CPU's memory has no history"),
        ({f"{A}ranks": [0, 1]}, "actor.profiler.ranks: rank 1 does not exist, the trainer has 1 rank(s)"),
        ({f"{A}tool": "npu"}, "actor.profiler.tool=npu is not supported (must be global_profiler.tool"),
        ({f"{A}tool_config__torch__contents": ["npu"]}, "contents=[npu]"),
        (
            {f"{G}profile_continuous_steps": True, f"{A}tool_config__torch__discrete": True},
            "profile_continuous_steps=True with actor_rollout_ref.actor.profiler.tool_config.torch.discrete=True",
        ),
        (
            {"algorithm__use_kl_in_reward": True, f"{REF}enable": True, f"{REF}tool_config__torch__discrete": True},
            "actor_rollout_ref.ref.profiler.tool_config.torch differs from that of actor_rollout_ref.actor",
        ),
        ({f"{A}tool_config__torch__schedule__active": 1}, "schedule.active=1 is not supported"),
        ({f"{G}finish_hook_cmd": "echo"}, "finish_hook_cmd=echo is not supported"),
        (
            {
                f"{R}enable": True,
                f"{R}tool_config__torch__profile_token_start": 4,
                f"{R}tool_config__torch__profile_token_end": 4,
            },
            "profile_token_end=4: must be above profile_token_start=4",
        ),
        (
            {f"{R}enable": True, "actor_rollout_ref__rollout__engine_kwargs": "{vllm: {profiler_config: {}}}"},
            "engine_kwargs.vllm.profiler_config: actor_rollout_ref.rollout.profiler sets it",
        ),
    ],
)
def test_a_profile_that_cannot_be_made_is_refused(tiny, problem_of, changes, words):
    assert words in problem_of(**tiny, **(ON | changes))


def test_settings_without_steps_are_accepted_with_a_note(tiny, plan_of):
    """As in a script of upstream verl that keeps its profiler for another day."""
    plan = plan_of(
        **tiny,
        **{f"{G}tool": "nsys", f"{G}save_path": "/profpath", f"{A}enable": True, f"{A}ranks": [0], f"{R}enable": True},
    )
    (note,) = (note for note in plan.notes if "without steps to profile" in note)
    assert all(name in note for name in ("global_profiler.tool", "actor.profiler.ranks", "rollout.profiler.enable"))


def test_roles_ranks_and_settings_of_a_profile():
    config = PPOConfig()
    config.trainer.n_gpus_per_node = 2
    profiler, actor = config.global_profiler, config.actor_rollout_ref.actor.profiler
    profiler.steps, actor.enable, config.actor_rollout_ref.ref.profiler.enable = [3], True, True
    assert trainer_profiles(config) is None  # no tool
    profiler.tool, profiler.save_path = "torch", "/p"
    found = trainer_profiles(config)
    assert found.ranks == {"actor": {0}} and (found.tool, found.save_path, found.discrete) == ("torch", "/p", False)
    config.actor_rollout_ref.actor.use_kl_loss = True  # a reference model
    config.actor_rollout_ref.ref.profiler.ranks, actor.all_ranks = [1], True
    assert trainer_profiles(config).ranks == {"actor": {0, 1}, "ref": {1}}
    assert rollout_profiles(config, 4) is None
    actor.tool_config.torch.discrete, actor.tool_config.torch.contents = True, ["stack"]
    assert rollout_profiles(config, 4).replicas == {0, 1, 2, 3}
    rollout = config.actor_rollout_ref.rollout
    rollout.tensor_model_parallel_size, rollout.profiler.all_ranks, rollout.profiler.ranks = 2, False, [0, 5]
    assert rollout_profiles(config, 4).replicas == {0, 2} and rollout_profiles(config, 4).contents == ("stack",)
    rollout.profiler.enable = False
    assert rollout_profiles(config, 4) is None


@pytest.mark.parametrize(("first", "last_step", "expected"), [(1, 9, 2), (2, 9, 2), (4, 9, 4), (6, 9, 8), (6, 7, 7)])
def test_a_joined_profile_ends_before_a_gap_or_with_the_run(first, last_step, expected):
    assert last_profiled({1, 2, 4, 6, 7, 8}, first, last_step) == expected
