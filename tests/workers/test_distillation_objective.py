"""The distillation loss: values and gradients against formulas in float64, and its part in the actor's objective."""

import pytest
import torch

from fixtures.engine_cases import actor_config, make_batch
from verl.config.distillation import DistillationLossConfig
from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
from verl.workers.distillation_objective import DistillationObjective
from verl.workers.policy_objective import PolicyObjective

TOKENS, LOW, HIGH, DUAL = 100, 0.1, 0.3, 3.0


@pytest.fixture
def case():
    columns = dict(make_batch(8).batch.items())
    mask = columns["response_mask"]
    generator = torch.Generator().manual_seed(0)
    log_probs, teacher, old = (torch.randn(mask.shape, generator=generator) - 3 for _ in range(3))
    columns |= {"teacher_log_probs": teacher, "old_log_probs": log_probs + 0.3 * (old + 3)}
    columns["rollout_is_weights"] = torch.rand(mask.shape, generator=generator) + 0.5
    return log_probs, columns


def objective(**settings):
    info = {"batch_num_tokens": TOKENS, "global_batch_size": 14, "loss_scale_factor": 7, "temperature": 1.0}
    actor = actor_config(loss_agg_mode="token-mean", use_kl_loss=False, entropy_coeff=0.0)
    policy = PolicyObjective(compute_policy_loss_vanilla, actor, info)
    return DistillationObjective(policy, DistillationLossConfig(**settings), actor, info)


def evaluate(log_probs, columns, **settings):
    """Return loss, gradient and metrics."""
    leaf = log_probs.clone().requires_grad_()
    loss, metrics = objective(**settings)(leaf, torch.zeros_like(leaf), columns)
    loss.backward()
    return loss.detach(), leaf.grad, metrics


def difference(log_probs, columns):
    return (log_probs - columns["teacher_log_probs"]).double()


@pytest.mark.parametrize(
    ("mode", "value", "slope"),
    [
        ("k2", lambda d: d * d / 2, lambda d: d),
        ("k3", lambda d: (-d).exp() + d - 1, lambda d: 1 - (-d).exp()),
        ("abs", torch.abs, torch.sign),
    ],
)
def test_an_estimate_is_differentiated(case, mode, value, slope):
    log_probs, columns = case
    mask = columns["response_mask"].double()
    d = difference(log_probs, columns)
    loss, gradient, metrics = evaluate(log_probs, columns, loss_mode=mode, use_task_rewards=False)
    kept = mask * (value(d) < 10)  # k3 is clamped to 10
    torch.testing.assert_close(loss.double(), (value(d).clamp(max=10) * mask).sum() / TOKENS)
    torch.testing.assert_close(gradient.double(), slope(d) * kept / TOKENS, atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(metrics["distillation/loss"], loss)
    torch.testing.assert_close(
        metrics["distillation/abs_loss"].double(), (value(d).abs().clamp(max=10) * mask).sum() / TOKENS
    )


def test_a_clamped_estimate_has_no_gradient(case):
    log_probs, columns = case
    d, mask = difference(log_probs, columns), columns["response_mask"].bool()
    loss, gradient, _ = evaluate(log_probs, columns, loss_mode="k2", loss_max_clamp=0.5, use_task_rewards=False)
    beyond = d * d / 2 > 0.5
    assert (beyond & mask).any() and (~beyond & mask).any()
    assert not gradient[beyond].any() and gradient[~beyond & mask].all()
    torch.testing.assert_close(loss.double(), ((d * d / 2).clamp(max=0.5) * mask).sum() / TOKENS)


def test_with_policy_gradient_the_negative_estimate_is_the_advantage(case):
    log_probs, columns = case
    settings = {"use_policy_gradient": True, "loss_mode": "k1", "clip_ratio_low": LOW, "clip_ratio_high": HIGH}
    loss, gradient, metrics = evaluate(log_probs, columns, **settings, loss_max_clamp=1.5, use_task_rewards=False)
    mask, weights = columns["response_mask"].double(), columns["rollout_is_weights"].double()
    advantage = -difference(log_probs, columns).clamp(-1.5, 1.5)
    ratio = (log_probs - columns["old_log_probs"]).double().exp().requires_grad_()
    token = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - LOW, 1 + HIGH))
    token = torch.where(advantage < 0, torch.minimum(token, -advantage * DUAL), token)
    expected = (token * weights * mask).sum() / TOKENS
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient.double(), (ratio.grad * ratio).detach(), rtol=1e-4, atol=1e-7)
    assert {"distillation/pg_clipfrac", "distillation/ppo_kl", "actor/pg_clipfrac"} <= set(metrics)
    assert metrics["distillation/pg_clipfrac"] != metrics["actor/pg_clipfrac"]


def test_task_rewards_and_distillation_are_added(case):
    log_probs, columns = case
    alone, gradient, _ = evaluate(log_probs, columns, use_task_rewards=False)
    both, of_both, metrics = evaluate(log_probs, columns, distillation_loss_coef=0.25)
    zero, of_policy, _ = evaluate(log_probs, columns, distillation_loss_coef=0.0)
    torch.testing.assert_close(both, metrics["actor/pg_loss"] + 0.25 * alone)
    torch.testing.assert_close(of_both, of_policy + 0.25 * gradient)
    torch.testing.assert_close(zero, metrics["actor/pg_loss"])
