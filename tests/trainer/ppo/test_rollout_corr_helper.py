"""Rollout correction through upstream verl's functions, against weights computed by hand."""

import math

import pytest
import torch

from verl.config import RolloutCorrectionConfig
from verl.protocol import DataProto
from verl.trainer.ppo.rollout_corr_helper import (
    compute_offpolicy_metrics,
    compute_rollout_correction_and_add_to_batch,
    compute_rollout_correction_and_rejection_mask,
)

OLD = torch.tensor([[-1.0, -1.0, -2.0], [-0.5, -3.0, 0.0]])
ROLLOUT = torch.tensor([[-1.0, -2.0, -2.0], [-0.5, -1.0, 0.0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


def test_weights_are_truncated_ratios():
    table, mask, metrics = compute_rollout_correction_and_rejection_mask(OLD, ROLLOUT, MASK, "token", 2.0)
    expected = [[1.0, 2.0, 1.0], [1.0, math.exp(-2), 0.0]]
    assert table.batch["rollout_is_weights"].tolist() == [pytest.approx(row) for row in expected]
    assert torch.equal(mask, MASK) and metrics["rollout_corr/rollout_is_max"] == 2.0
    assert metrics["rollout_corr/kl"] == pytest.approx((0 - 1 + 0 + 0 + 2) / 5)
    assert compute_offpolicy_metrics(OLD, ROLLOUT, MASK)["kl"] == pytest.approx(0.2)


@pytest.mark.parametrize("form", [lambda **keys: RolloutCorrectionConfig(**keys), dict])
def test_rejected_tokens_leave_the_response_mask(form):
    batch = DataProto.from_dict({"old_log_probs": OLD, "rollout_log_probs": ROLLOUT, "response_mask": MASK})
    config = form(rollout_is=None, rollout_rs="token_k1", rollout_rs_threshold="0.5_2.0")
    batch, metrics = compute_rollout_correction_and_add_to_batch(batch, config)
    assert batch.batch["response_mask"].tolist() == [[1, 0, 1], [1, 0, 0]]
    assert "rollout_is_weights" not in batch.batch and metrics["rollout_corr/rollout_rs_masked_fraction"] == 0.4
