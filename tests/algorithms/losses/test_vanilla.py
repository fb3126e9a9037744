"""The PPO loss against a float64 loop."""

import math
from types import SimpleNamespace

import pytest
import torch

from verl.algorithms.losses.vanilla import clipped_policy_loss, compute_policy_loss_vanilla

CONFIG = SimpleNamespace(clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0)


def reference_token(old, new, advantage, low, high, c):
    """Loss, 1 if clipped, 1 if clipped by the dual clip, and kl of one token."""
    log_ratio = min(max(new - old, -20.0), 20.0)
    ratio = math.exp(log_ratio)
    unclipped = -advantage * ratio
    bounded = -advantage * min(max(ratio, 1 - low), 1 + high)
    loss = max(unclipped, bounded)
    dual = advantage < 0 and loss > -advantage * c
    if dual:
        loss = -advantage * c
    return loss, float(bounded > unclipped), float(dual), -log_ratio


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(2)

    def normal(scale):
        return torch.randn(8, 6, generator=generator, dtype=torch.float64) * scale

    old = normal(1.0) - 3
    new = old + normal(0.3)
    # large, tiny and overflowing ratios
    new[0, :] = old[0, :] + torch.tensor([3.0, -3.0, 25.0, -25.0, 100.0, 1e-9], dtype=torch.float64)
    advantages = normal(1.0)
    advantages[1] = 0.0
    mask = (torch.rand(8, 6, generator=generator) > 0.3).long()
    mask[0] = 1
    mask[5] = 0
    # between and beyond the bounds 0.8 and 1.28, with either sign of the advantage
    ratios = torch.tensor([1.25, 1.5, 0.9, 0.7, 1.25, 0.7], dtype=torch.float64)
    new[2] = old[2] + ratios.log()
    advantages[2] = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    mask[2] = 1
    return old, new, advantages, mask


def test_ppo_loss_equals_the_loop(batch):
    old, new, advantages, mask = batch
    loss, metrics = compute_policy_loss_vanilla(old, new, advantages, mask, "token-mean", CONFIG)
    kept = [(i, j) for i in range(8) for j in range(6) if mask[i, j]]
    rows = [
        reference_token(old[i, j].item(), new[i, j].item(), advantages[i, j].item(), 0.2, 0.28, 3.0) for i, j in kept
    ]
    means = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
    assert loss.item() == pytest.approx(means[0], rel=1e-12)
    assert metrics["actor/pg_clipfrac"].item() == pytest.approx(means[1], rel=1e-12)
    assert metrics["actor/pg_clipfrac_lower"].item() == pytest.approx(means[2], rel=1e-12)
    assert metrics["actor/ppo_kl"].item() == pytest.approx(means[3], rel=1e-12)
    assert means[1] > 0 and means[2] > 0


def test_gradient_is_the_policy_gradient_inside_the_bounds_and_0_if_clipped():
    old = torch.zeros(1, 5, dtype=torch.float64)
    new = torch.tensor([[0.1, 0.5, 0.5, -0.5, 2.0]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[2.0, 2.0, -2.0, -2.0, -2.0]], dtype=torch.float64)
    loss, *_ = clipped_policy_loss(old, new, advantages, clip_low=0.2, clip_high=0.28, clip_c=3.0)
    loss.sum().backward()
    # inside: -A r; above with A > 0: clipped; above with A < 0: -A r; below with A < 0: clipped; r = 7.4 > c: dual clip
    expected = [-2.0 * math.exp(0.1), 0.0, 2.0 * math.exp(0.5), 0.0, 0.0]
    torch.testing.assert_close(new.grad[0], torch.tensor(expected, dtype=torch.float64))


def test_bounds_default_to_clip_ratio(batch):
    old, new, advantages, mask = batch
    from_clip_ratio = SimpleNamespace(clip_ratio=0.1, clip_ratio_low=None, clip_ratio_high=None, clip_ratio_c=3.0)
    explicit = SimpleNamespace(clip_ratio=0.5, clip_ratio_low=0.1, clip_ratio_high=0.1, clip_ratio_c=3.0)
    a, _ = compute_policy_loss_vanilla(old, new, advantages, mask, "token-mean", from_clip_ratio)
    b, _ = compute_policy_loss_vanilla(old, new, advantages, mask, "token-mean", explicit)
    assert a.item() == b.item()


def test_importance_weights_scale_tokens_and_get_no_gradient(batch):
    old, new, advantages, mask = batch
    weights = torch.full_like(old, 0.25, requires_grad=True)
    new = new.clone().requires_grad_()
    unweighted, _ = compute_policy_loss_vanilla(old, new, advantages, mask, "token-sum", CONFIG)
    weighted, _ = compute_policy_loss_vanilla(old, new, advantages, mask, "token-sum", CONFIG, weights)
    weighted.backward()
    assert weighted.item() == pytest.approx(0.25 * unweighted.item(), rel=1e-12)
    assert weights.grad is None


def test_parts_of_a_mini_batch_add_up_to_it(batch):
    old, new, advantages, mask = batch
    info = {
        "batch_num_tokens": int(mask.sum()),
        "global_batch_size": int((mask.sum(1) > 0).sum()),
        "loss_scale_factor": 6,
    }
    config = SimpleNamespace(**vars(CONFIG), global_batch_info=info)
    whole, of_whole = compute_policy_loss_vanilla(old, new, advantages, mask, "seq-mean-token-mean", CONFIG)
    cuts = [slice(0, 3), slice(3, 4), slice(4, 8)]
    parts = [
        compute_policy_loss_vanilla(old[c], new[c], advantages[c], mask[c], "seq-mean-token-mean", config) for c in cuts
    ]
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole.item(), rel=1e-12)
    for name, value in of_whole.items():
        assert sum(metrics[name].item() for _, metrics in parts) == pytest.approx(value.item(), rel=1e-12)


def test_dual_clip_must_exceed_one(batch):
    old, new, advantages, _ = batch
    with pytest.raises(ValueError, match=r"clip_ratio_c=1\.0"):
        clipped_policy_loss(old, new, advantages, clip_low=0.2, clip_high=0.2, clip_c=1.0)
