"""The function of a model's logits is found from the images of a probe, and differentiated."""

import pytest
import torch

from verl.workers.engine.logits_function import LogitsFunction, fit, probe

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x, LogitsFunction()),
        (lambda x: x * 0.0625, LogitsFunction(0.0625)),
        (lambda x: x / 8.0, LogitsFunction(0.125)),
        (lambda x: 30.0 * torch.tanh(x / 30.0), LogitsFunction(cap=30.0)),
        (lambda x: 2.0 * torch.tanh(x / 2.0), LogitsFunction(cap=2.0)),
    ],
)
@pytest.mark.parametrize("width", [64, 152_064])
def test_scales_and_caps_are_found_exactly(function, expected, width):
    values = probe(width, CPU)
    assert fit(values, function(values)) == expected


def test_a_scale_before_a_cap_is_found_up_to_rounding():
    values = probe(64, CPU)
    found = fit(values, 20.0 * torch.tanh(values * 0.3 / 20.0))
    assert found is not None and found.cap == 20.0 and found.scale == pytest.approx(0.3, rel=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + 1.0,
        lambda x: x.clamp(-10.0, 10.0),
        lambda x: x.clamp(-0.1, 0.1),
        lambda x: x.masked_fill(torch.arange(len(x)) == 7, -1e9),
        lambda x: torch.zeros_like(x),
        lambda x: x.log_softmax(-1),
        lambda x: x.abs(),
        lambda x: x * torch.nan,
    ],
)
def test_other_functions_are_not_approximated(function):
    values = probe(64, CPU)
    assert fit(values, function(values)) is None


@pytest.mark.parametrize("function", [LogitsFunction(), LogitsFunction(0.3), LogitsFunction(0.7, 2.0)])
def test_derivatives_equal_those_of_autograd(function):
    x = torch.linspace(-5, 5, 11, dtype=torch.float64, requires_grad=True)
    scaled = function.scale * x
    expected = scaled if function.cap is None else function.cap * torch.tanh(scaled / function.cap)
    y = function.apply_(x.detach().clone())
    torch.testing.assert_close(y, expected.detach(), rtol=1e-14, atol=1e-14)
    weights = torch.arange(11, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(expected, x, weights)
    torch.testing.assert_close(function.backward_(weights.clone(), y), gradient, rtol=1e-12, atol=1e-14)
