"""Rows become a batch whatever order their samples finish in; each is reported; a batch knows where its prompts end."""

import asyncio
from types import SimpleNamespace

import pytest
from torch.utils.data import Dataset

from verl.agent_loop.agent_loop import AgentLoopOutput
from verl.agent_loop.generation import GenerationTimes, ScoredSample
from verl.config import PPOConfig
from verl.trainer.rollouts.prompts import PromptSource
from verl.trainer.rollouts.sampling import Sampling
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
    """Answers prompt i's k-th sample with i + k tokens, the last one that was asked for first.

    With `fails` only that one ends, with an error.
    """

    def __init__(self, scores=lambda prompt, k: float(k), fails=None):
        self.scores, self.fails = scores, fails
        self.asked, self.waiting, self.cancelled = {}, [], 0

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
        k = self.asked[row["uid"]] = self.asked.get(row["uid"], -1) + 1
        tokens = [10 * prompt + k] * (prompt + k)
        output = AgentLoopOutput([prompt], tokens, [1] * len(tokens), [-1.0] * len(tokens), [0] * len(tokens))
        return ScoredSample(row, output, RewardResult(self.scores(prompt, k), {}, None, 0.0))


async def awake():
    pass


def make(generator, n=3, with_baselines=False, **algorithm):
    config = PPOConfig()
    config.data.train_batch_size = 2
    config.actor_rollout_ref.rollout.n = n
    for name, value in algorithm.items():
        setattr(config.algorithm.filter_groups, name, value)
    source = PromptSource(build_dataloader(Rows(), batch_size=2, shuffle=False, seed=0, drop_last=True))
    return Sampling(
        config,
        generator,
        source,
        SimpleNamespace(scorer="a scorer"),
        tokenizer=TOKENIZER,
        sleep=awake,
        with_baselines=with_baselines,
        total_steps=9,
    )


@pytest.mark.parametrize("reported", [False, True])
async def test_samples_stand_next_to_each_other_in_the_order_of_their_rows(reported):
    seen, timing = {}, {}

    def arrived(row, sample, tokens):
        assert row not in seen
        seen[row] = (sample.output.response_ids, tokens)

    made = await make(Generator()).generate(4, timing, arrived if reported else None)
    answers = [[10 * prompt + k] * (prompt + k) for prompt in (1, 2) for k in range(3)]
    mask = made.batch.batch["response_mask"].bool()
    assert [row[m].tolist() for row, m in zip(made.batch.batch["responses"], mask, strict=True)] == answers
    assert made.batch.non_tensor_batch["uid"].tolist() == ["1.0"] * 3 + ["1.1"] * 3
    assert made.batch.meta_info == {"temperature": 1.0, "global_step": 4} and made.behind.draws == 1
    assert timing.keys() == {"gen", "reward"}
    if reported:
        assert list(seen) != sorted(seen), "in the order in which they finish"
        assert [seen[row] for row in range(6)] == [(tokens, 1 + len(tokens)) for tokens in answers]


async def test_the_first_error_ends_the_other_samples():
    generator = Generator(fails=3)
    with pytest.raises(RuntimeError, match="no replica left"):
        await make(generator).generate(1, {}, lambda *_: None)
    for _ in range(5):
        await asyncio.sleep(0)
    assert generator.cancelled == 5


async def test_greedy_answers_are_baselines():
    made = await make(Generator(scores=lambda prompt, k: prompt + k / 8), with_baselines=True).generate(1, {})
    scores = made.batch.batch["token_level_scores"].sum(-1).tolist()
    baselines = made.batch.batch["reward_baselines"].tolist()
    assert (
        len(scores) == len(baselines) == 6
        and baselines[:3] == baselines[:1] * 3
        and baselines[3:] == baselines[3:4] * 3
    )
    assert {int(score) for score in baselines[:3]} == {1} and {int(score) for score in baselines[3:]} == {2}


async def test_dynamic_sampling_ends_behind_the_last_draw_it_took():
    # The groups of odd prompts are all alike: one of each draw is kept.
    generator = Generator(scores=lambda prompt, k: 0.0 if prompt % 2 else float(k))
    sampling = make(generator, enable=True, metric="seq_reward")
    made = await sampling.generate(1, {}, lambda *_: pytest.fail("not known yet whether it is trained on"))
    assert made.behind.draws == 2 and made.metrics["train/num_gen_batches"] == 2
    assert made.batch.non_tensor_batch["uid"].tolist() == ["1.1"] * 3 + ["2.1"] * 3
    assert (await sampling.generate(2, {})).behind.draws == 4
