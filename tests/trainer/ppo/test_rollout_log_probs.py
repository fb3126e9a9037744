"""`old_log_probs` from the rollout: which values are the trainer's, and when none are the rollout's.

The trainer's and the rollout's log-probabilities are two random tables here, and expected values are computed in loops.
"""

import logging
import math
from itertools import chain

import pytest
import torch

from verl.config.old_log_probs import OldLogProbsConfig
from verl.protocol import DataProto
from verl.trainer.ppo.rollout_log_probs import RECOMPUTED, RolloutLogProbs
from verl.workers.reward.loop import RESERVED_NAMES

B, T, STEP = 40, 6, 5


def batch_of(gap=1e-3, seed=1):
    """Samples of 0 to T tokens, every third one with a hole; the trainer's values differ by about `gap`."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(T) < torch.arange(B)[:, None] % (T + 1)).long()
    mask[::3, 1] = 0
    rollout = -3 * torch.rand(B, T, generator=generator)
    trainer = (rollout + gap * torch.randn(B, T, generator=generator)) * mask
    # Padding of the engine's values is not 0.
    rollout = torch.where(mask.bool(), rollout, 7.0)
    versions = torch.where(mask.bool(), STEP - 1, -1)
    columns = {"response_mask": mask, "rollout_log_probs": rollout, "weight_versions": versions}
    return DataProto.from_dict(tensors={**columns, "row": torch.arange(B)}), trainer


class Trainer:
    """Computes log-probabilities from a table, and notes the rows of each forward pass."""

    def __init__(self, table):
        self.table, self.calls = table, []

    async def forward(self, batch):
        rows = batch.batch["row"].tolist()
        self.calls.append(rows)
        return DataProto.from_dict(tensors={"old_log_probs": self.table[rows]})


def test_no_other_column_may_have_the_name():
    assert RECOMPUTED in RESERVED_NAMES


def reuse(ranks=1, seed=0, **settings):
    return RolloutLogProbs(OldLogProbsConfig(enable=True, **settings), seed=seed, ranks=ranks)


def expected_check(batch, table, rows):
    """Return mean |d| and mean exp(d) - 1 - d over the tokens of some rows."""
    columns = batch.batch
    ds = [
        float(table[row, t]) - float(columns["rollout_log_probs"][row, t])
        for row in rows
        for t in range(T)
        if columns["response_mask"][row, t]
    ]
    return sum(map(abs, ds)) / len(ds), sum(math.exp(d) - 1 - d for d in ds) / len(ds)


async def test_checked_samples_are_the_trainers_and_all_others_the_rollouts():
    batch, table = batch_of()
    trainer = Trainer(table)
    result, metrics = await reuse(sample_fraction=0.25, min_samples=2).add_old_log_probs(batch, STEP, trainer.forward)
    (checked,) = trainer.calls
    with_tokens = [row for row in range(B) if batch.batch["response_mask"][row].any()]
    assert len(checked) == math.ceil(0.25 * len(with_tokens)) and set(checked) <= set(with_tokens)
    old, mask = result.batch["old_log_probs"], batch.batch["response_mask"].bool()
    for row in range(B):
        source = table if row in checked else batch.batch["rollout_log_probs"] * mask
        assert torch.equal(old[row], source[row])
    assert result.batch["recomputed_samples"].nonzero().flatten().tolist() == checked
    difference, k3_kl = expected_check(batch, table, checked)
    assert metrics["rollout_corr/checked_difference"] == pytest.approx(difference, rel=1e-9)
    assert metrics["rollout_corr/checked_k3_kl"] == pytest.approx(k3_kl, rel=1e-6)
    reused = sum(int(mask[row].sum()) for row in range(B) if row not in checked)
    assert metrics["rollout_corr/reused_fraction"] == pytest.approx(reused / int(mask.sum()))


@pytest.mark.parametrize(
    ("limits", "ok"),
    [
        ({"max_difference": 0.05, "max_k3_kl": 1.0}, False),
        ({"max_difference": 1.0, "max_k3_kl": 1e-3}, False),
        ({"max_difference": 0.2, "max_k3_kl": 0.1}, True),
    ],
)
async def test_above_either_limit_every_sample_is_computed_once(limits, ok):
    batch, table = batch_of(gap=0.1)
    trainer = Trainer(table)
    result, metrics = await reuse(**limits).add_old_log_probs(batch, STEP, trainer.forward)
    assert (metrics["rollout_corr/reused_fraction"] > 0.5) == ok
    if not ok:
        assert metrics["rollout_corr/reused_fraction"] == 0 and "rollout_corr/checked_k3_kl" in metrics
        assert torch.equal(result.batch["old_log_probs"], table) and bool(result.batch["recomputed_samples"].all())
        assert sorted(chain(*trainer.calls)) == list(range(B)) and len(trainer.calls) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
async def test_a_check_with_a_value_that_is_not_finite_fails(value):
    batch, table = batch_of()
    table = torch.where(table != 0, value, table)
    result, metrics = await reuse().add_old_log_probs(batch, STEP, Trainer(table).forward)
    assert metrics["rollout_corr/reused_fraction"] == 0
    assert torch.equal(result.batch["old_log_probs"].isfinite(), table.isfinite())


async def test_tokens_of_older_weights_are_computed_and_not_checked():
    batch, table = batch_of()
    stale = [4, 5, 6, 11, 12, 13]
    for row in stale:
        batch.batch["weight_versions"][row, 0] = STEP - 2  # one token of the response
        table[row, 0] -= 5.0
    batch.batch["rollout_log_probs"][20, 0] = math.nan
    trainer = Trainer(table)
    result, metrics = await reuse(min_samples=4).add_old_log_probs(batch, STEP, trainer.forward)
    (computed,) = trainer.calls
    checked = [row for row in computed if row not in (*stale, 20)]
    assert len(computed) == len(checked) + len(stale) + 1 and len(checked) == 4
    assert all(torch.equal(result.batch["old_log_probs"][row], table[row]) for row in (*stale, 20))
    assert metrics["rollout_corr/checked_difference"] == pytest.approx(
        expected_check(batch, table, checked)[0], rel=1e-9
    )


async def test_without_a_sample_of_the_current_weights_all_are_computed(caplog):
    batch, table = batch_of()
    batch.batch["weight_versions"] -= 1
    trainer = Trainer(table)
    with caplog.at_level(logging.INFO):
        result, metrics = await reuse().add_old_log_probs(batch, STEP, trainer.forward)
    assert metrics == {"rollout_corr/reused_fraction": 0.0}
    assert torch.equal(result.batch["old_log_probs"], table)
    assert trainer.calls == [list(range(B))]
    assert "too few samples" in caplog.text


@pytest.mark.parametrize(("ranks", "passes"), [(8, [8, 32]), (33, [40]), (40, [40])])
async def test_every_pass_has_a_sample_for_each_rank(ranks, passes):
    batch, table = batch_of(gap=1.0)
    trainer = Trainer(table)
    result, _ = await reuse(ranks=ranks, min_samples=1).add_old_log_probs(batch, STEP, trainer.forward)
    assert [len(rows) for rows in trainer.calls] == passes
    assert torch.equal(result.batch["old_log_probs"], table)


async def test_the_choice_follows_from_seed_and_step():
    chosen = {}
    for seed, step in ((0, STEP), (0, STEP), (1, STEP), (0, STEP + 1)):
        batch, table = batch_of()
        batch.batch["weight_versions"] += step - STEP
        trainer = Trainer(table)
        await reuse(seed=seed).add_old_log_probs(batch, step, trainer.forward)
        assert chosen.setdefault((seed, step), trainer.calls) == trainer.calls
    assert len({str(calls) for calls in chosen.values()}) == 3


async def test_a_change_of_the_decision_is_logged_once(caplog):
    log_probs = reuse()
    with caplog.at_level(logging.INFO):
        for step, gap in enumerate((1e-3, 1e-3, 0.5, 0.5, 1e-3), 1):
            batch, table = batch_of(gap)
            batch.batch["weight_versions"] += step - STEP
            await log_probs.add_old_log_probs(batch, step, Trainer(table).forward)
    words = [(record.levelname, record.message.split(":")[0]) for record in caplog.records]
    assert words == [("INFO", "step 1"), ("WARNING", "step 3"), ("INFO", "step 5")]
    assert "max_difference=0.02" in caplog.records[1].message and "max_k3_kl=0.001" in caplog.records[1].message
