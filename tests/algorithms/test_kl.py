"""KL estimators against scalar formulas, and their gradients."""

import math

import pytest
import torch

from verl.algorithms.kl import kl_penalty

DIFFERENCES = [-50.0, -20.0, -3.0, -1e-3, 0.0, 1e-6, 0.5, 2.0, 19.0, 21.0, 100.0]


def reference(name, d):
    if name in ("kl", "k1"):
        return d
    if name == "abs":
        return abs(d)
    if name in ("mse", "k2"):
        return d * d / 2
    negative = min(max(-d, -20.0), 20.0)
    return min(max(math.exp(negative) - negative - 1, -10.0), 10.0)


@pytest.mark.parametrize("name", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"])
@pytest.mark.parametrize("suffix", ["", "+"])
def test_estimators_equal_their_formula(name, suffix):
    logprob = torch.tensor(DIFFERENCES, dtype=torch.float64) - 2.0
    value = kl_penalty(logprob, torch.full_like(logprob, -2.0), name + suffix)
    expected = torch.tensor([reference(name, d) for d in DIFFERENCES], dtype=torch.float64)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"])
def test_plus_estimators_have_the_gradient_of_k2(name):
    logprob = torch.tensor(DIFFERENCES, dtype=torch.float64, requires_grad=True)
    kl_penalty(logprob, torch.zeros_like(logprob), name + "+").sum().backward()
    # d/dx of x^2 / 2
    torch.testing.assert_close(logprob.grad, torch.tensor(DIFFERENCES, dtype=torch.float64))


def test_low_var_kl_has_its_own_gradient():
    logprob = torch.tensor([-1.0, 0.3, 2.0, -40.0], dtype=torch.float64, requires_grad=True)
    kl_penalty(logprob, torch.zeros_like(logprob), "low_var_kl").sum().backward()
    expected = [1 - math.exp(1.0), 1 - math.exp(-0.3), 1 - math.exp(-2.0), 0.0]
    torch.testing.assert_close(logprob.grad, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("name", ["kl2", "full", ""])
def test_unknown_or_unsupported_estimator_is_an_error(name):
    with pytest.raises(ValueError, match="low_var_kl"):
        kl_penalty(torch.zeros(1), torch.zeros(1), name)
