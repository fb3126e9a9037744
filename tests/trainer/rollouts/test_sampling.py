"""The batch of a step: order of its samples, callbacks, baselines and loader state."""

import asyncio
from types import SimpleNamespace

import pytest
from torch.utils.data import Dataset

from verl.agent_loop.agent_loop import AgentLoopOutput
from verl.agent_loop.generation import GenerationTimes, ScoredSample
from verl.config import PPOConfig
from verl.trainer.rollouts.prompts import PromptSource
from verl.trainer.rollouts.sampling import RolloutSampler
from verl.utils.dataset.loader import build_dataloader
from verl.workers.reward import RewardResult

TOKENIZER = SimpleNamespace(pad_token_id=0)


class Rows(Dataset):
    """Row i has the prompt [i + 1]."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return {"prompt_token_ids": [i + 1], "raw_prompt": "", "data_source": "d", "reward_model": {}}


class Generator:
    """Generates i + k tokens for the k-th sample of prompt i; the last requested sample finishes first.

    If `fails` is set, only that request ends, with an error.
    """

    def __init__(self, scores=lambda prompt, k: float(k), fails=None):
        self.scores, self.fails = scores, fails
        self.requested, self.waiting, self.cancelled = {}, [], 0

    async def generate(self, rows, sampling):
        started = len(self.waiting)
        samples = [self.sample(row) for row in rows]
        turn = asyncio.get_running_loop().create_future()
        self.waiting.append(turn)
        asyncio.get_running_loop().call_soon(self.release)
        try:
            await turn
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return samples, GenerationTimes(started, started + 10, started + 12)

    def release(self):
        turn = self.waiting.pop()
        if self.fails is None:
            turn.set_result(None)
        elif len(self.waiting) == self.fails:
            turn.set_exception(RuntimeError("no replica left"))

    def sample(self, row):
        prompt = row["prompt_token_ids"][0]
        k = self.requested[row["uid"]] = self.requested.get(row["uid"], -1) + 1
        tokens = [10 * prompt + k] * (prompt + k)
        output = AgentLoopOutput([prompt], tokens, [1] * len(tokens), [-1.0] * len(tokens), [0] * len(tokens))
        return ScoredSample(row, output, RewardResult(self.scores(prompt, k), {}, None, 0.0))


async def no_sleep():
    pass


def make_sampler(generator, n=3, with_baselines=False, **algorithm):
    config = PPOConfig()
    config.data.train_batch_size = 2
    config.actor_rollout_ref.rollout.n = n
    for name, value in algorithm.items():
        setattr(config.algorithm.filter_groups, name, value)
    source = PromptSource(build_dataloader(Rows(), batch_size=2, shuffle=False, seed=0, drop_last=True))
    return RolloutSampler(
        config,
        generator,
        source,
        SimpleNamespace(scorer="a scorer"),
        tokenizer=TOKENIZER,
        sleep=no_sleep,
        with_baselines=with_baselines,
        total_steps=9,
    )


@pytest.mark.parametrize("reported", [False, True])
async def test_samples_of_a_prompt_are_adjacent_and_in_the_order_of_the_rows(reported):
    finished, timing = {}, {}

    def on_sample_finished(row, sample, tokens):
        assert row not in finished
        finished[row] = (sample.output.response_ids, tokens)

    made = await make_sampler(Generator()).generate(4, timing, on_sample_finished if reported else None)
    responses = [[10 * prompt + k] * (prompt + k) for prompt in (1, 2) for k in range(3)]
    mask = made.batch.batch["response_mask"].bool()
    assert [row[m].tolist() for row, m in zip(made.batch.batch["responses"], mask, strict=True)] == responses
    assert made.batch.non_tensor_batch["uid"].tolist() == ["1.0"] * 3 + ["1.1"] * 3
    assert made.batch.meta_info == {"temperature": 1.0, "global_step": 4} and made.loader_state.draws == 1
    assert timing.keys() == {"gen", "reward"}
    if reported:
        assert list(finished) != sorted(finished), "in the order in which they finish"
        assert [finished[row] for row in range(6)] == [(tokens, 1 + len(tokens)) for tokens in responses]


async def test_the_first_error_cancels_the_other_samples():
    generator = Generator(fails=3)
    with pytest.raises(RuntimeError, match="no replica left"):
        await make_sampler(generator).generate(1, {}, lambda *_: None)
    for _ in range(5):
        await asyncio.sleep(0)
    assert generator.cancelled == 5


async def test_greedy_responses_are_baselines():
    made = await make_sampler(Generator(scores=lambda prompt, k: prompt + k / 8), with_baselines=True).generate(1, {})
    scores = made.batch.batch["token_level_scores"].sum(-1).tolist()
    baselines = made.batch.batch["reward_baselines"].tolist()
    assert (
        len(scores) == len(baselines) == 6
        and baselines[:3] == baselines[:1] * 3
        and baselines[3:] == baselines[3:4] * 3
    )
    assert {int(score) for score in baselines[:3]} == {1} and {int(score) for score in baselines[3:]} == {2}


async def test_dynamic_sampling_returns_the_state_after_its_last_draw():
    # All samples of odd prompts have the same reward: one group of each draw is kept.
    generator = Generator(scores=lambda prompt, k: 0.0 if prompt % 2 else float(k))
    sampler = make_sampler(generator, enable=True, metric="seq_reward")
    made = await sampler.generate(1, {}, lambda *_: pytest.fail("unknown whether the sample is trained on"))
    assert made.loader_state.draws == 2 and made.metrics["train/num_gen_batches"] == 2
    assert made.batch.non_tensor_batch["uid"].tolist() == ["1.1"] * 3 + ["2.1"] * 3
    assert (await sampler.generate(2, {})).loader_state.draws == 4


async def test_the_description_of_a_sample_keeps_the_text_and_the_reward():
    sampler = make_sampler(Generator())
    sampler._tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: f"text of {ids}")
    row = {"uid": "3.1", "reward_model": {"ground_truth": "42"}}
    reward = RewardResult(0.25, {"score": 1.0, "acc": True}, None, 0.0)
    described = sampler.describe(ScoredSample(row, AgentLoopOutput([1], [2], [1]), reward))
    assert described == {
        "input": "text of [1]",
        "output": "text of [2]",
        "gts": "42",
        "score": 0.25,
        "uid": "3.1",
        "extra_score": 1.0,
        "acc": True,
    }
