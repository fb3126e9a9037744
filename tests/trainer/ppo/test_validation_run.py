"""A validation from the rows of its files to the metrics."""

import logging
from types import SimpleNamespace

import pytest
from torch.utils.data import Dataset

from verl.agent_loop.agent_loop import AgentLoopOutput
from verl.agent_loop.generation import GenerationTimes, ScoredSample
from verl.config import PPOConfig
from verl.trainer.ppo.validation_run import ValidationRun
from verl.trainer.rollouts.sampling import RolloutSampler
from verl.utils.dataset.loader import build_dataloader
from verl.workers.reward import RewardResult


class Rows(Dataset):
    """Rows with the given prompts; the right answer of row i is i."""

    def __init__(self, prompts):
        self.prompts = prompts

    def __len__(self):
        return len(self.prompts)

    def __getitem__(self, i):
        messages = [{"role": "user", "content": self.prompts[i]}]
        return {"raw_prompt": messages, "data_source": "d", "reward_model": {"ground_truth": i}}


class Generator:
    """Scores a sample with `score(row, k)`: `row` counts the rows, k the samples of the row."""

    def __init__(self, score):
        self.score, self.seen = score, {}

    async def generate(self, rows, sampling):
        samples = []
        for row in rows:
            number = row["reward_model"]["ground_truth"]
            k = self.seen[number] = self.seen.get(number, -1) + 1
            score = self.score(number, k)
            result = RewardResult(score, {"acc": score}, None, 0.0)
            output = AgentLoopOutput([1], [2], [1], num_turns=2 + 2 * (number == 0))
            samples.append(ScoredSample(row, output, result))
        return samples, GenerationTimes(0, 0, 0)


async def validate(prompts, score, *, n=1, batch_size=None):
    config = PPOConfig()
    config.actor_rollout_ref.rollout.val_kwargs.n = n
    loader = build_dataloader(
        Rows(prompts), batch_size=batch_size or len(prompts), shuffle=False, seed=0, drop_last=False
    )
    sampler = RolloutSampler(
        config,
        Generator(score),
        None,
        SimpleNamespace(scorer="a scorer"),
        tokenizer=None,
        sleep=None,
        with_baselines=False,
        total_steps=9,
    )
    run = ValidationRun(config, SimpleNamespace(data=SimpleNamespace(val_loader=loader), sampler=sampler))
    return (await run.run(3))[0]


@pytest.mark.parametrize("batch_size", [None, 7])
async def test_rows_with_the_same_prompt_are_separate_prompts(batch_size, caplog):
    # Rows 0 and 1 share a prompt and are the only wrong ones.
    prompts = ["shared", "shared", *(f"question {i}" for i in range(98))]
    with caplog.at_level(logging.WARNING):
        metrics = await validate(prompts, lambda row, k: float(row > 1), batch_size=batch_size)
    means = {name: value for name, value in metrics.items() if "/mean@" in name}
    assert means == {"val-core/d/acc/mean@1": pytest.approx(0.98), "val-aux/d/reward/mean@1": pytest.approx(0.98)}
    assert "100 rows of data_source=d have 99 different prompts" in caplog.text
    turns = {kind: metrics[f"val-aux/num_turns/{kind}"] for kind in ("min", "max", "mean")}
    assert turns == {"min": 2, "max": 4, "mean": pytest.approx(2.02)}


async def test_repeated_problems_have_the_mean_of_all_samples():
    # 3 problems, 8 times each: solved always, every second time, never.
    prompts = [f"problem {i % 3}" for i in range(24)]
    metrics = await validate(prompts, lambda row, k: [1.0, float(row // 3 % 2), 0.0][row % 3])
    assert metrics["val-core/d/acc/mean@1"] == pytest.approx(0.5)
    one_row_each = await validate(prompts[:3], lambda row, k: [1.0, float(k % 2), 0.0][row], n=8)
    assert one_row_each["val-core/d/acc/mean@8"] == pytest.approx(0.5)
    assert one_row_each["val-core/d/acc/best@8/mean"] == pytest.approx(2 / 3, abs=0.01)
