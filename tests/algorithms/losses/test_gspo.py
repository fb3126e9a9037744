"""GSPO against a loop with the derivative by hand."""

import math

import pytest

from fixtures.loss_cases import CLIPFRAC, KL, check_against, make_loss_batch, run_loss, sequence_rows
from verl.algorithms.losses.gspo import compute_policy_loss_gspo


@pytest.mark.parametrize("weighted", [False, True])
def test_gspo_equals_the_loop(weighted):
    batch, expected = make_loss_batch(), {}
    for row, columns, d, advantages in sequence_rows(batch):
        log_s = math.fsum(d) / len(d)
        s, slope = math.exp(min(log_s, 10.0)), math.exp(log_s) if log_s <= 10.0 else 0.0
        for j, x, a in zip(columns, d, advantages, strict=True):
            clipped = min(max(s, 0.8), 1.28)
            binds = -a * clipped > -a * s
            expected[row, j] = (
                -a * clipped if binds else -a * s,
                0.0 if binds else -a * slope,
                {CLIPFRAC: binds, KL: -x},
            )
    results = run_loss(compute_policy_loss_gspo, batch, batch.weights if weighted else None)
    check_against(batch, results, expected, "seq-mean-token-mean", weighted)
    assert 0.1 < results[1][CLIPFRAC].item() < 0.9


def test_gspo_ignores_loss_agg_mode():
    batch = make_loss_batch()
    by_sum = run_loss(compute_policy_loss_gspo, batch, mode="token-sum")
    assert by_sum[0] == run_loss(compute_policy_loss_gspo, batch, mode="token-mean")[0]
