"""Cached rollouts: what is kept, what is read, and which files are refused."""

import asyncio
import dataclasses
import json
from types import SimpleNamespace

import pytest
from torch.utils.data import Dataset

from verl.agent_loop.agent_loop import AgentLoopOutput
from verl.agent_loop.generation import GenerationTimes, ScoredSample
from verl.config import PPOConfig
from verl.preflight.inputs import RunInputs
from verl.trainer.rollouts.prompts import PromptSource
from verl.trainer.rollouts.rollout_cache import RolloutCacheError, make_rollout_cache
from verl.trainer.rollouts.sampling import RolloutSampler
from verl.utils.dataset.loader import build_dataloader
from verl.workers.reward import RewardResult

MODEL = "actor_rollout_ref.model.path"


class Rows(Dataset):
    """Row i has the prompt [offset + i]."""

    def __init__(self, offset=1):
        self.offset = offset

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return {
            "prompt_token_ids": [self.offset + i],
            "raw_prompt": f"prompt {i}",
            "data_source": "d",
            "reward_model": {"ground_truth": str(i)},
            "extra_info": {"index": i, "nested": [1, {"a": None}]},
            "index": i,
        }


class Generator:
    """Samples that differ in every field; a tool's tokens are in each of them. `seen` counts the samples."""

    def __init__(self):
        self.seen = 0

    async def generate(self, rows, sampling):
        return [self.sample(row, sampling) for row in rows], GenerationTimes(1, 2, 3)

    def sample(self, row, sampling):
        self.seen += 1
        number, prompt = self.seen, row["prompt_token_ids"]
        length = 1 + number % 4
        output = AgentLoopOutput(
            prompt_ids=prompt * (1 + number % 2),
            response_ids=[number + k for k in range(length + 1)],
            response_mask=[1] * length + [0],
            response_logprobs=[-number / 7 - k for k in range(length)] + [0.0],
            weight_versions=[number % 3] * length + [-1],
            stop_reason=("stop", "length")[number % 2],
            num_turns=number,
            extra_fields={"tool": [number, "x"]},
            metrics={"calls": number / 3},
        )
        error = "timeout" if number % 5 == 0 else None
        reward = RewardResult(0.0 if error else number / 3, {} if error else {"acc": number / 3}, error, 0.25, "d")
        return ScoredSample(row, output, reward)


def config_for(tmp_path, **changes):
    config = PPOConfig()
    config.data.train_batch_size = 2
    config.data.max_prompt_length = config.data.max_response_length = 16
    config.actor_rollout_ref.rollout.n = 3
    config.actor_rollout_ref.rollout.calculate_log_probs = True
    skip = config.skip.rollout
    skip.enable, skip.dump_dir, skip.steps = True, str(tmp_path), [1, 3]
    for name, value in changes.items():
        *path, last = name.split("__")
        owner = config
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, last, value)
    return config


def inputs(weights="0a"):
    return RunInputs({MODEL: {"model.safetensors": {"bytes": 9, "blake2b": weights, "sampled": False}}}, {}, "code")


def run(config, steps, rows=None, files=None, with_baselines=False):
    """Return the batches of the steps, in order, and the number of samples that were generated for them."""

    async def sleep():
        pass

    async def generate():
        sampler = RolloutSampler(
            config,
            generator,
            PromptSource(build_dataloader(rows or Rows(), batch_size=2, shuffle=False, seed=0, drop_last=True)),
            SimpleNamespace(scorer="a scorer"),
            tokenizer=SimpleNamespace(pad_token_id=0),
            sleep=sleep,
            with_baselines=with_baselines,
            total_steps=9,
            cache=make_rollout_cache(config, files or inputs(), with_baselines=with_baselines),
        )
        finished = []
        made = [await sampler.generate(step, {}, lambda row, sample, tokens: finished.append(row)) for step in steps]
        assert len(finished) == len(steps) * 6
        return made

    generator = Generator()
    return asyncio.run(generate()), generator.seen


def plain(generated):
    """Return everything of a batch as plain values."""
    batch = generated.batch
    tensors = {name: (str(values.dtype), values.tolist()) for name, values in batch.batch.items()}
    columns = {name: values.tolist() for name, values in batch.non_tensor_batch.items()}
    return tensors, columns, batch.meta_info, generated.metrics, generated.loader_state


@pytest.mark.parametrize("with_baselines", [False, True])
def test_a_second_run_gets_the_same_batches_without_generating(tmp_path, with_baselines):
    config, per_step = config_for(tmp_path), 8 if with_baselines else 6
    first, generated = run(config, [1, 2, 3], with_baselines=with_baselines)
    assert generated == 3 * per_step
    second, generated = run(config, [1, 2, 3], with_baselines=with_baselines)
    assert generated == per_step, "only step 2, which is not in steps"
    assert [plain(second[i]) for i in (0, 2)] == [plain(first[i]) for i in (0, 2)]
    assert ("reward_baselines" in second[0].batch.batch) == with_baselines
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors"))
    folder = f"{config.trainer.experiment_name}_{config.trainer.project_name}/GBS2_N3_in16_out16"
    assert names == [f"{folder}/{step}/samples_0.safetensors" for step in (1, 3)]


def test_every_draw_of_dynamic_sampling_is_kept(tmp_path):
    groups = {"algorithm__filter_groups__enable": True, "algorithm__filter_groups__metric": "seq_reward"}
    config = config_for(tmp_path, **groups, data__train_batch_size=4, data__gen_batch_size=2)
    first, generated = asyncio.run(_filtered(config))
    second, again = asyncio.run(_filtered(config))
    assert generated == 12 and again == 0 and plain(first) == plain(second)


async def _filtered(config):
    generator = Generator()

    async def sleep():
        pass

    sampler = RolloutSampler(
        config,
        generator,
        PromptSource(build_dataloader(Rows(), batch_size=2, shuffle=False, seed=0, drop_last=True)),
        SimpleNamespace(scorer="a scorer"),
        tokenizer=SimpleNamespace(pad_token_id=0),
        sleep=sleep,
        with_baselines=False,
        total_steps=9,
        cache=make_rollout_cache(config, inputs(), with_baselines=False),
    )
    return await sampler.generate(1, {}), generator.seen


def test_repeat_trains_on_the_nearest_step(tmp_path):
    first, _ = run(config_for(tmp_path), [1, 2, 3])
    config = config_for(tmp_path, skip__rollout__steps=[1, 2, 3, 4], skip__rollout__action="repeat")
    again, generated = run(config, [1, 2, 3, 4])
    assert generated == 0
    for made, source in zip(again, (0, 0, 2, 2), strict=True):
        (tensors, columns, _, metrics, _), expected = plain(made), plain(first[source])
        assert (tensors, columns, metrics) == (expected[0], expected[1], expected[3])
    assert [made.loader_state.draws for made in again] == [1, 2, 3, 4], "the prompts of the steps count as used"
    empty = config_for(tmp_path / "other", skip__rollout__action="repeat")
    assert run(empty, [1])[1] == 6, "there is nothing to repeat"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"actor_rollout_ref__rollout__temperature": 0.5}, "rollout.temperature (1.0, now 0.5)"),
        ({"actor_rollout_ref__rollout__top_p": 0.5}, "rollout.top_p"),
        ({"actor_rollout_ref__rollout__agent__default_agent_loop": "tool_agent"}, "agent.default_agent_loop"),
        ({"reward__reward_manager__name": "dapo"}, "reward.reward_manager.name"),
    ],
)
def test_files_of_other_settings_are_refused_at_the_start(tmp_path, changes, words):
    run(config_for(tmp_path), [1])
    with pytest.raises(RolloutCacheError, match=r"restore them, or choose another skip\.rollout\.dump_dir") as error:
        make_rollout_cache(config_for(tmp_path, **changes), inputs(), with_baselines=False)
    assert words in str(error.value)


def test_files_of_another_model_or_estimator_are_refused(tmp_path):
    run(config_for(tmp_path), [1])
    with pytest.raises(RolloutCacheError, match=f"other the files of {MODEL};"):
        make_rollout_cache(config_for(tmp_path), inputs("0b"), with_baselines=False)
    with pytest.raises(RolloutCacheError, match="greedy baselines"):
        make_rollout_cache(config_for(tmp_path), inputs(), with_baselines=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"actor_rollout_ref__rollout__max_num_seqs": 7, "actor_rollout_ref__rollout__gpu_memory_utilization": 0.25},
        {"actor_rollout_ref__actor__clip_ratio": 0.5, "reward__num_workers": 3},
    ],
)
def test_settings_of_the_trainer_and_of_the_speed_may_differ(tmp_path, changes):
    run(config_for(tmp_path), [1])
    assert run(config_for(tmp_path, **changes), [1])[1] == 0


def test_other_limits_and_sizes_have_files_of_their_own(tmp_path):
    run(config_for(tmp_path), [1])
    assert run(config_for(tmp_path, data__max_response_length=17), [1])[1] == 6


def test_other_prompts_are_refused(tmp_path):
    run(config_for(tmp_path), [1])
    with pytest.raises(RolloutCacheError, match="other prompts than those of step 1"):
        run(config_for(tmp_path), [1], rows=Rows(offset=2))


def test_a_damaged_file_is_refused(tmp_path):
    run(config_for(tmp_path), [1])
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(RolloutCacheError, match=r"damaged.*choose another skip.rollout.dump_dir"):
        make_rollout_cache(config_for(tmp_path), inputs(), with_baselines=False)


def test_values_that_json_would_change_are_errors(tmp_path):
    config = config_for(tmp_path)
    cache = make_rollout_cache(config, inputs(), with_baselines=False)
    sample = Generator().sample({**Rows()[0], "uid": "1.0"}, {})
    sample.output = dataclasses.replace(sample.output, extra_fields={"pair": (1, 2)})
    assert cache.load(1, [sample.row]) is None
    with pytest.raises(ValueError, match=r"extra_fields.*a tuple"):
        cache.save(1, [sample.row], [sample])
    assert not list(tmp_path.rglob("*.safetensors")) and json.dumps(sample.row)
