"""The KL penalty against a float64 loop, and the controllers against their recurrence."""

import math

import pytest
import torch

from verl.algorithms.kl_in_reward import get_kl_controller, penalized_rewards


def loop_kl(kind, old, ref):
    d = old - ref
    if kind == "kl":
        return d
    if kind == "abs":
        return abs(d)
    if kind == "mse":
        return 0.5 * d * d
    return min(max(math.exp(min(max(-d, -20), 20)) + d - 1, -10), 10)


@pytest.mark.parametrize("kind", ["kl", "abs", "mse", "low_var_kl"])
@pytest.mark.parametrize("plus", ["", "+"])
def test_penalized_rewards_equal_the_loop(kind, plus):
    generator = torch.Generator().manual_seed(3)
    scores, old, ref = (torch.randn(5, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    old[1, 2], ref[1, 2] = -0.1, -40.0
    mask = (torch.rand(5, 6, generator=generator) > 0.3).long()
    mask[1, 2] = 1
    mask[3] = 0
    old[~mask.bool()] = math.nan
    rewards, current = penalized_rewards(scores, old, ref, mask, estimator=kind + plus, kl_coef=0.3)
    means = []
    for i in range(5):
        kls = [loop_kl(kind, old[i, j].item(), ref[i, j].item()) if mask[i, j] else 0.0 for j in range(6)]
        for j in range(6):
            assert rewards[i, j].item() == pytest.approx(scores[i, j].item() - 0.3 * kls[j], rel=1e-5, abs=1e-6)
        if mask[i].any():
            means.append(math.fsum(kls) / mask[i].sum().item())
    assert current == pytest.approx(math.fsum(means) / len(means), rel=1e-9)
    assert rewards.dtype == torch.float32


def test_rewards_without_a_token_have_no_penalty():
    zero = torch.zeros(2, 3)
    rewards, current = penalized_rewards(zero + 1, zero, zero - 5, zero.long(), estimator="kl", kl_coef=1.0)
    assert rewards.tolist() == [[1.0] * 3] * 2
    assert current == 0.0


def test_fixed_weight_is_constant():
    controller = get_kl_controller("fixed", kl_coef=0.02, target_kl=0.1, horizon=10)
    controller.update(50.0, n_steps=1000)
    assert controller.value == 0.02


def test_adaptive_weight_follows_its_recurrence():
    controller = get_kl_controller("adaptive", kl_coef=0.02, target_kl=0.1, horizon=1000)
    value = 0.02
    for kl, error in ((0.11, 0.1), (5.0, 0.2), (0.09, -0.1), (0.0, -0.2), (0.1, 0.0)):
        controller.update(kl, n_steps=50)
        value *= 1 + error * 50 / 1000
        assert controller.value == pytest.approx(value, rel=1e-12)


def test_unknown_controller_type_is_an_error():
    with pytest.raises(ValueError, match=r"unknown algorithm\.kl_ctrl\.type='adaptve': use fixed or adaptive"):
        get_kl_controller("adaptve", 0.1, 0.1, 1)
