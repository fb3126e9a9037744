"""The input of the reward loop, and rewards as columns. No engine, real reward workers."""

import asyncio
import textwrap

import numpy as np
import pytest

from verl.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput, register
from verl.agent_loop.generation import SampleGenerator, ScoredSample, to_batch
from verl.config import CustomRewardFunctionConfig, PPOConfig, RewardConfig, RewardManagerConfig
from verl.utils.sampling_masks import SamplingMasks
from verl.workers.reward import RewardLoop, RewardResult
from verl.workers.reward.loop import RESERVED_NAMES


@register("echo_for_this_test")
class EchoLoop(AgentLoopBase):
    """Responds with the tokens of the row."""

    async def run(self, sampling_params, **row):
        ids = row["response_ids"]
        return AgentLoopOutput(prompt_ids=[7], response_ids=ids, response_mask=[1] * len(ids))


class Words:
    """A tokenizer that maps token `i` to the letter `a` + i; 0 is a special token without text."""

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join(chr(ord("a") + i) for i in ids if i)


@pytest.fixture
def generate(tmp_path):
    """Return `generate(source, manager, kwargs, responses)`: scored samples whose responses are these token ids."""

    def run(source, manager, kwargs, responses):
        path = tmp_path / "reward.py"
        path.write_text(textwrap.dedent(source))
        config = RewardConfig(
            custom_reward_function=CustomRewardFunctionConfig(path=str(path)),
            reward_manager=RewardManagerConfig(name=manager),
            reward_kwargs=kwargs,
            num_workers=1,
            timeout=5.0,
        )
        rewards = RewardLoop(config)
        config = PPOConfig()
        config.actor_rollout_ref.rollout.agent.default_agent_loop = "echo_for_this_test"
        generator = SampleGenerator(None, Words(), rewards, config)
        rows = [
            {"uid": str(i), "data_source": "d", "reward_model": {}, "raw_prompt": [], "response_ids": ids}
            for i, ids in enumerate(responses)
        ]
        try:
            return asyncio.run(generator.generate(rows, {}))[0]
        finally:
            rewards.close()

    return run


def test_the_length_penalty_of_dapo_counts_tokens(generate):
    samples = generate(
        "def compute_score(data_source, solution_str, ground_truth, extra_info): return len(solution_str)",
        "dapo",
        {"max_resp_len": 6, "overlong_buffer_cfg": {"enable": True, "len": 4, "penalty_factor": 1.0, "log": True}},
        [[1, 1], [1, 1, 0, 0], [0] * 6, []],
    )
    # Special tokens count as length although the scorer does not see them.
    assert [sample.reward.score for sample in samples] == [2.0, 2.0 - 0.5, 0.0 - 1.0, 0.0]
    batch = to_batch(samples, pad_token_id=0, with_log_probs=False)
    assert batch.batch["token_level_scores"].sum(dim=-1).tolist() == [2.0, 1.5, -1.0, 0.0]
    assert batch.non_tensor_batch["overlong_reward"].tolist() == [0.0, -0.5, -1.0, 0.0]
    assert batch.non_tensor_batch["score"].tolist() == [2.0, 2.0, 0.0, 0.0]


def sample(reward):
    row = {"uid": "0", "data_source": "d", "reward_model": {}, "raw_prompt": []}
    return ScoredSample(row, AgentLoopOutput([1], [2], [1]), reward)


def test_a_sample_without_score_is_zero_in_numeric_columns():
    batch = to_batch(
        [
            sample(RewardResult(1.0, {"acc": 1.0, "pred": "4"}, None, 0.0)),
            sample(RewardResult(0.0, {}, "timeout", 0.3)),
            sample(RewardResult(0.5, {"pred": "5"}, None, 0.0)),
        ],
        pad_token_id=0,
        with_log_probs=False,
    )
    columns = batch.non_tensor_batch
    assert columns["acc"].tolist() == [1.0, 0.0, None]
    assert columns["pred"].tolist() == ["4", None, "5"]
    assert all(columns[name].dtype == np.dtype(object) for name in ("acc", "pred", "uid"))


def test_the_index_of_a_row_is_a_column():
    """A sampler that learns from the batch finds its rows by it."""
    samples = [sample(RewardResult(1.0, {"acc": 1.0}, None, 0.0)) for _ in range(2)]
    samples[0].row["index"], samples[1].row["index"] = 7, None
    batch = to_batch(samples, pad_token_id=0, with_log_probs=False)
    assert batch.non_tensor_batch["index"].tolist() == [7, None]


def test_the_names_of_columns_are_reserved_and_a_loop_must_not_use_them():
    row = {"uid": "0", "data_source": "d", "reward_model": {}, "raw_prompt": []}
    output = AgentLoopOutput([7], [1], [1], [-1.0], [0])
    sample = ScoredSample(row, output, RewardResult(1.0, {}, None, 0.0))
    batch = to_batch([sample], pad_token_id=0, with_log_probs=True)
    assert {*batch.batch.keys(), *batch.non_tensor_batch} <= RESERVED_NAMES
    output.extra_fields["responses"] = "mine"
    with pytest.raises(ValueError, match="the agent loop returns responses, which the batch already has"):
        to_batch([sample], pad_token_id=0, with_log_probs=True)


def masked(response, response_mask, ids, counts):
    row = {"uid": "0", "data_source": "d", "reward_model": {}, "raw_prompt": []}
    masks = SamplingMasks(np.array(ids, np.int32), np.array(counts, np.int32))
    output = AgentLoopOutput([7], response, response_mask, sampling_masks=masks)
    return ScoredSample(row, output, RewardResult(1.0, {}, None, 0.0))


def test_sampling_masks_are_a_column():
    samples = [masked([4, 5], [1, 1], [4, 9, 5], [2, 1]), masked([6, 1, 2], [1, 0, 1], [6, 3], [2, 0, 0])]
    batch = to_batch(samples, pad_token_id=0, with_log_probs=False, with_sampling_masks=True)
    assert batch.non_tensor_batch["sampling_masks"].tolist() == [each.output.sampling_masks for each in samples]
    assert "sampling_masks" in RESERVED_NAMES
    samples[0].output.extra_fields["sampling_masks"] = 1
    with pytest.raises(ValueError, match="the agent loop returns sampling_masks, which the batch already has"):
        to_batch(samples, pad_token_id=0, with_log_probs=False, with_sampling_masks=True)
    del samples[0].output.extra_fields["sampling_masks"]
    assert "sampling_masks" not in to_batch(samples, pad_token_id=0, with_log_probs=False).non_tensor_batch


@pytest.mark.parametrize(
    ("ids", "counts", "problem"),
    [
        ([], [], "an agent loop returned 0 sampling masks for 2 response tokens"),
        ([4, 5, 5], [1, 1, 1], "returned 3 sampling masks for 2 response tokens"),
        ([4, 4], [1, 1], "the sampling mask of response token 1 does not contain the token, id 5"),
    ],
)
def test_wrong_sampling_masks_of_an_agent_loop_are_an_error(ids, counts, problem):
    with pytest.raises(ValueError, match=rf"replay_sampling_mask=True: .*{problem}; return response\.sampling_masks"):
        to_batch([masked([4, 5], [1, 1], ids, counts)], pad_token_id=0, with_log_probs=False, with_sampling_masks=True)
