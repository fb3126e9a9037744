"""The keys that a fully asynchronous run and upstream verl's training loops determine."""

import pytest

from fixtures.config_error import load_error
from verl.config import ConfigError, load_config
from verl.config.entry_points import FULLY_ASYNC
from verl.config.stream import Stream, resolve_stream, training_steps
from verl.trainer.main_ppo import compose

ROLLOUT = "actor_rollout_ref.rollout."
# The command line of upstream verl's fully_async_policy/shell/dapo_7b_math_fsdp2_64_64.sh, as far as it is special.
SCRIPT = [
    "data.train_batch_size=0",
    "data.gen_batch_size=1",
    "actor_rollout_ref.hybrid_engine=False",
    "actor_rollout_ref.actor.ppo_mini_batch_size=32",
    "rollout.nnodes=8",
    "rollout.n_gpus_per_node=8",
    "rollout.total_rollout_steps=204800",
    "trainer.total_epochs=10",
    "async_training.staleness_threshold=0.5",
    "async_training.trigger_parameter_sync_step=4",
    "async_training.require_batches=4",
    "async_training.partial_rollout=True",
]


def run(keys):
    """Return the config of a fully asynchronous run with these keys."""
    return compose(keys, FULLY_ASYNC).valid()


def test_a_script_of_upstream_trains_on_its_batches_between_two_weight_updates():
    config = run(SCRIPT)
    assert (config.data.train_batch_size, config.data.gen_batch_size) == (512, 768)
    assert config.actor_rollout_ref.rollout.partial_rollout and config.algorithm.rollout_correction.bypass_mode
    assert (config.actor_rollout_ref.rollout.nnodes, config.actor_rollout_ref.rollout.n_gpus_per_node) == (8, 8)
    assert resolve_stream(config) == Stream(4, 128, 768, 16, 1, drain=False)
    # 204,800 prompts at most, and ten epochs of the data at most; steps cross the end of an epoch.
    assert training_steps(config, 17_000) == 170_000 // 512
    assert training_steps(config, 30_000) == 400


def test_without_bypass_mode_a_step_is_one_update_and_without_partial_rollouts_new_weights_wait():
    decoupled = run([*SCRIPT, "algorithm.rollout_correction.bypass_mode=False"])
    assert resolve_stream(decoupled) == Stream(1, 512, 768, 16, 1, drain=False)
    whole = run([*SCRIPT, "async_training.partial_rollout=False"])
    assert resolve_stream(whole) == Stream(4, 128, 768, 16, 1, drain=True)
    assert not whole.actor_rollout_ref.rollout.partial_rollout


@pytest.mark.parametrize(("staleness", "bound"), [("0", 0), ("0.1", 1), ("1", 1), ("1.5", 2)])
def test_the_age_of_a_token_is_the_staleness_rounded_up(staleness, bound):
    keys = [*SCRIPT, f"async_training.staleness_threshold={staleness}"]
    assert resolve_stream(run(keys)).max_staleness == bound
    assert resolve_stream(run([*keys, f"{ROLLOUT}max_staleness=4"])).max_staleness == 4


def test_batch_sizes_that_a_fully_asynchronous_run_determines_have_no_other_value():
    enable = ["async_training.enable=True", "actor_rollout_ref.actor.ppo_mini_batch_size=2"]
    text = load_error(*enable, "data.train_batch_size=1024", "data.gen_batch_size=3")
    assert "data.train_batch_size=1024: " in text and "use 8, or 0" in text
    assert "data.gen_batch_size=3: " in text
    assert load_config([*enable, "data.train_batch_size=8"]) == load_config(enable)


def test_partial_rollouts_alone_have_one_update_and_all_prompts_at_once():
    assert resolve_stream(load_config()) is None
    keys = [f"{ROLLOUT}partial_rollout=True", "data.gen_batch_size=12", "data.train_batch_size=8"]
    assert resolve_stream(load_config(keys)) == Stream(1, 8, 12, None, 8, drain=False)
    assert training_steps(load_config([*keys, "trainer.total_epochs=3"]), 20) == 6


def test_separate_async_is_a_fully_asynchronous_run_of_whole_batches():
    config = load_config(
        [
            "trainer.v1.trainer_mode=separate_async",
            "trainer.v1.separate_async.num_warmup_batches=1",
            "trainer.v1.separate_async.parameter_sync_step=4",
            "trainer.v1.sampler.max_off_policy_threshold=3",
            "data.train_batch_size=8",
            "actor_rollout_ref.actor.ppo_mini_batch_size=2",
            f"{ROLLOUT}nnodes=1",
            "algorithm.rollout_correction.bypass_mode=True",
        ]
    )
    assert config.async_training.enable
    assert resolve_stream(config) == Stream(4, 2, 16, 16, 3, drain=False)


def test_colocate_async_is_a_run_with_partial_rollouts():
    keys = ["trainer.v1.trainer_mode=colocate_async", "data.train_batch_size=8"]
    assert resolve_stream(load_config(keys)) == Stream(1, 8, 16, None, 8, drain=False)
    assert not load_config(keys).async_training.enable


@pytest.mark.parametrize(
    ("mode", "key"),
    [
        ("separate_async", "async_training.staleness_threshold=0.5"),
        ("separate_async", f"{ROLLOUT}max_staleness=2"),
        ("colocate_async", "data.gen_batch_size=9"),
    ],
)
def test_a_training_loop_of_upstream_sets_its_keys_itself(mode, key):
    text = load_error(f"trainer.v1.trainer_mode={mode}", key)
    assert text.startswith(f"{key.split('=')[0]} with trainer.v1.trainer_mode={mode}") and f"trainer.v1.{mode}" in text


@pytest.mark.parametrize("staleness", ["1e9", "1e308"])
def test_more_prompts_in_progress_than_a_key_can_hold_are_an_error(staleness):
    """The number becomes data.gen_batch_size, which the record of the config could not be read with."""
    with pytest.raises(
        ConfigError, match=r"async_training\.staleness_threshold=1(e\+308|000000000\.0): .* at most 2147483647"
    ):
        run([*SCRIPT, f"async_training.staleness_threshold={staleness}"])
