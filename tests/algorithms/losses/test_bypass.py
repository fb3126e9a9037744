"""The loss of bypass mode against loops: PPO on pi/mu, or REINFORCE with weights; with and without rejection."""

import math
from types import SimpleNamespace

import pytest
import torch

from verl.algorithms.losses.bypass import compute_policy_loss_bypass_mode
from verl.config.rollout_correction import (
    PRESETS,
    Band,
    Correction,
    Rejection,
    RolloutCorrectionConfig,
    resolve,
)
from verl.trainer.ppo.core_algos import LOSS_AGG_MODES, get_policy_loss_fn

CLIP = {"clip_ratio": 0.5, "clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0}
REJECTIONS = (Rejection("token_k1", Band(0.7, 1.9)), Rejection("seq_mean_k1", Band(0.8, 1.15)))


def config_of(correction, **more):
    return SimpleNamespace(**CLIP, rollout_correction=correction, **more)


def correction_of(loss_type, rejections=(), **keys):
    return Correction(bypass_mode=True, loss_type=loss_type, rejections=rejections, **keys)


@pytest.fixture
def batch():
    """log mu, log pi, advantages, mask: [6, 5]; one sequence is empty, one has a single token."""
    generator = torch.Generator().manual_seed(5)

    def normal(scale):
        return torch.randn(6, 5, generator=generator, dtype=torch.float64) * scale

    log_mu = -normal(1.0).abs() - 0.1
    log_pi = log_mu + normal(0.3)
    log_pi[0] = log_mu[0] + torch.tensor([0.02, -0.03, 0.6, 0.01, -0.6], dtype=torch.float64)
    log_pi[1] = log_mu[1] + torch.tensor([100.0, -100.0, 0.1, 0.0, 0.3], dtype=torch.float64)
    log_pi[5] = log_mu[5] + torch.tensor([0.3, 0.2, 0.3, 0.4, 0.3], dtype=torch.float64)
    mask = torch.ones(6, 5, dtype=torch.int64)
    mask[2], mask[3, 1:], mask[4, 2] = 0, 0, 0
    return log_mu, log_pi, normal(1.0), mask


def sequences(batch):
    """For each sequence, its tokens as (log mu, log pi, advantage)."""
    log_mu, log_pi, advantages, mask = batch
    keep = mask.bool()
    return [
        list(
            zip(log_mu[i][keep[i]].tolist(), log_pi[i][keep[i]].tolist(), advantages[i][keep[i]].tolist(), strict=True)
        )
        for i in range(len(mask))
    ]


def kept_tokens(sequence, rejected):
    """For each token, True if it passes 0.7 <= ratio <= 1.9 and its sequence 0.8 <= geometric mean <= 1.15."""
    if not rejected or not sequence:
        return [True] * len(sequence)
    geometric = math.exp(math.fsum(p - m for m, p, _ in sequence) / len(sequence))
    return [0.7 <= math.exp(min(p - m, 50)) <= 1.9 and 0.8 <= geometric <= 1.15 for m, p, _ in sequence]


def clipped_loss(m, p, a):
    """Loss, 1 if clipped, 1 if clipped by the dual clip."""
    ratio = math.exp(min(max(p - m, -20), 20))
    unclipped, bounded = -a * ratio, -a * min(max(ratio, 0.8), 1.28)
    loss = max(unclipped, bounded)
    dual = a < 0 and loss > -a * 3
    return (-a * 3 if dual else loss), float(bounded > unclipped), float(dual)


def weight_of(sequence, i, level, lo, hi, zero):
    if level is None:
        return 1.0
    d = sequence[i][1] - sequence[i][0] if level == "token" else math.fsum(p - m for m, p, _ in sequence)
    w = math.exp(min(max(d, -20), 20))
    return (w if lo <= w <= hi else 0.0) if zero else min(w, hi)


def aggregated(rows, mode, width):
    """Aggregate a value of each token of each sequence."""
    rows = [row for row in rows if row]
    if mode == "token-mean":
        return math.fsum(v for row in rows for v in row) / sum(map(len, rows))
    if mode == "token-sum":
        return math.fsum(v for row in rows for v in row)
    divisor = {
        "seq-mean-token-sum": lambda row: 1,
        "seq-mean-token-mean": len,
        "seq-mean-token-sum-norm": lambda _: width,
    }
    return math.fsum(math.fsum(row) / divisor[mode](row) for row in rows) / len(rows)


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
@pytest.mark.parametrize("rejected", [False, True])
def test_ppo_clip_loss_equals_the_loop(batch, mode, rejected):
    log_mu, log_pi, advantages, mask = batch
    correction = correction_of("ppo_clip", REJECTIONS if rejected else ())
    loss, metrics = compute_policy_loss_bypass_mode(log_mu, log_pi, advantages, mask, mode, config_of(correction))
    rows, keep = sequences(batch), [kept_tokens(row, rejected) for row in sequences(batch)]
    parts = [
        [tuple(x * k for x in clipped_loss(*token)) for token, k in zip(*pair, strict=True)]
        for pair in zip(rows, keep, strict=True)
    ]
    columns = [[[token[c] for token in row] for row in parts] for c in range(3)]
    assert loss.item() == pytest.approx(aggregated(columns[0], mode, 5), rel=1e-12)
    assert metrics["actor/pg_clipfrac"].item() == pytest.approx(aggregated(columns[1], "token-mean", 5), rel=1e-12)
    assert metrics["actor/pg_clipfrac_lower"].item() == pytest.approx(
        aggregated(columns[2], "token-mean", 5), rel=1e-12
    )
    kl = [[m - p for m, p, _ in row] for row in rows]
    limited = [[min(max(v, -20), 20) for v in row] for row in kl]
    assert metrics["actor/ppo_kl"].item() == pytest.approx(aggregated(limited, "token-mean", 5), rel=1e-12)
    assert ("actor/bypass_masked_fraction" in metrics) == rejected
    if rejected:
        share = aggregated([[float(not k) for k in row] for row in keep], "token-mean", 5)
        assert metrics["actor/bypass_masked_fraction"].item() == pytest.approx(share) and 0 < share < 1


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
@pytest.mark.parametrize("rejected", [False, True])
@pytest.mark.parametrize("level", [None, "token", "sequence"])
@pytest.mark.parametrize(("band", "zero"), [((0.5, 2.0), False), ((0.8, 1.5), True)])
def test_reinforce_loss_equals_the_loop(batch, mode, rejected, level, band, zero):
    log_mu, log_pi, advantages, mask = batch
    keys = {"rollout_is": level, "rollout_is_band": Band(*band), "rollout_is_zero": zero}
    correction = correction_of("reinforce", REJECTIONS if rejected else (), **keys)
    log_pi = log_pi.clone().requires_grad_()
    loss, metrics = compute_policy_loss_bypass_mode(log_mu, log_pi, advantages, mask, mode, config_of(correction))
    rows, keep = sequences(batch), [kept_tokens(row, rejected) for row in sequences(batch)]
    weights = [[weight_of(row, i, level, *band, zero) for i in range(len(row))] for row in rows]
    values = [
        [-w * a * p if k else 0.0 for w, k, (_, p, a) in zip(*three, strict=True)]
        for three in zip(weights, keep, rows, strict=True)
    ]
    assert loss.item() == pytest.approx(aggregated(values, mode, 5), rel=1e-12)
    assert "actor/pg_clipfrac" not in metrics
    assert ("actor/bypass_is_mean" in metrics) == (level is not None)
    if level is not None:
        assert metrics["actor/bypass_is_mean"].item() == pytest.approx(aggregated(weights, "token-mean", 5), rel=1e-12)


def test_gradient_of_reinforce_is_minus_weight_times_advantage(batch):
    log_mu, log_pi, advantages, mask = batch
    correction = correction_of("reinforce", REJECTIONS, rollout_is="sequence")
    log_pi = log_pi.clone().requires_grad_()
    loss, _ = compute_policy_loss_bypass_mode(log_mu, log_pi, advantages, mask, "token-sum", config_of(correction))
    loss.backward()
    expected = torch.zeros(6, 5, dtype=torch.float64)
    for i, row in enumerate(sequences(batch)):
        columns = [j for j in range(5) if mask[i, j]]
        for t, (j, k) in enumerate(zip(columns, kept_tokens(row, True), strict=True)):
            expected[i, j] = -weight_of(row, t, "sequence", 0.5, 2.0, False) * row[t][2] if k else 0.0
    torch.testing.assert_close(log_pi.grad, expected)
    assert bool((expected != 0).any())


def test_rejected_token_has_no_gradient_and_counts_in_the_denominator(batch):
    log_mu, log_pi, advantages, mask = batch
    log_pi = log_pi.clone().requires_grad_()
    correction = correction_of("ppo_clip", (Rejection("seq_mean_k1", Band(0.8, 1.15)),))
    loss, _ = compute_policy_loss_bypass_mode(log_mu, log_pi, advantages, mask, "token-mean", config_of(correction))
    loss.backward()
    whole = [i for i, row in enumerate(sequences(batch)) if row and not 0.8 <= _geometric(row) <= 1.15]
    assert 0 < len(whole) < 5
    assert not log_pi.grad[whole].any()
    tokens = int(mask.sum())
    alone = [i for i in range(6) if i not in whole]
    kept_loss, _ = compute_policy_loss_bypass_mode(
        log_mu[alone], log_pi[alone], advantages[alone], mask[alone], "token-sum", config_of(correction)
    )
    assert loss.item() == pytest.approx(kept_loss.item() / tokens, rel=1e-12)


def _geometric(row):
    return math.exp(math.fsum(p - m for m, p, _ in row) / len(row))


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("bypass")])
def test_parts_of_a_mini_batch_add_up_to_it(batch, mode, preset):
    log_mu, log_pi, advantages, mask = batch
    correction = resolve(RolloutCorrectionConfig(preset=preset))
    info = {
        "batch_num_tokens": int(mask.sum()),
        "global_batch_size": int((mask.sum(1) > 0).sum()),
        "loss_scale_factor": 5,
    }
    whole, of_whole = compute_policy_loss_bypass_mode(log_mu, log_pi, advantages, mask, mode, config_of(correction))
    config = config_of(correction, global_batch_info=info)
    parts = [
        compute_policy_loss_bypass_mode(log_mu[c], log_pi[c], advantages[c], mask[c], mode, config)
        for c in (slice(0, 1), slice(1, 3), slice(3, 6))
    ]
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole.item(), rel=1e-12, abs=1e-15)
    for name, value in of_whole.items():
        assert sum(metrics[name].item() for _, metrics in parts) == pytest.approx(value.item(), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("loss_type", ["ppo_clip", "reinforce"])
def test_loss_without_a_kept_token_or_without_a_token_is_0(loss_type):
    log_mu, mask = torch.full((2, 3), -1.0), torch.ones(2, 3)
    for log_pi, present in ((log_mu + 3, mask), (log_mu - 100, mask), (log_mu.clone(), torch.zeros(2, 3))):
        log_pi = log_pi.clone().requires_grad_()
        correction = correction_of(loss_type, (Rejection("token_k1", Band(0.5, 2.0)),), rollout_is="token")
        loss, metrics = compute_policy_loss_bypass_mode(
            log_mu, log_pi, torch.ones(2, 3), present, "seq-mean-token-mean", config_of(correction)
        )
        loss.backward()
        assert loss.item() == 0.0 and not log_pi.grad.any()
        assert all(math.isfinite(value.item()) for value in metrics.values())


def test_bypass_mode_is_registered_and_requires_a_correction(batch):
    log_mu, log_pi, advantages, mask = batch
    function = get_policy_loss_fn("bypass_mode")
    arguments = {
        "old_log_prob": log_mu,
        "log_prob": log_pi,
        "advantages": advantages,
        "response_mask": mask,
        "loss_agg_mode": "token-mean",
    }
    for correction in (None, Correction(), {"bypass_mode": True}):
        with pytest.raises(ValueError, match=r"algorithm\.rollout_correction\.bypass_mode=True"):
            function(**arguments, config=config_of(correction), rollout_is_weights=None)
    with pytest.raises(ValueError, match="bypass_mode=True"):
        function(**arguments, config=SimpleNamespace(**CLIP), rollout_is_weights=None)
    with pytest.raises(ValueError, match="rollout_is_weights must be None"):
        function(**arguments, config=config_of(correction_of("reinforce")), rollout_is_weights=torch.ones_like(log_mu))
    assert math.isfinite(function(**arguments, config=config_of(correction_of("ppo_clip")))[0].item())
