"""Log-probabilities, entropies and sums of squares from logits: values, gradients, chunks."""

import math

import pytest
import torch

from verl.workers.engine import log_probs as module
from verl.workers.engine.log_probs import token_log_probs


def reference(logits, target, temperature):
    scaled = [x / temperature for x in logits]
    top = max(scaled)
    z = math.fsum(math.exp(x - top) for x in scaled)
    probs = [math.exp(x - top) / z for x in scaled]
    return math.log(probs[target]), -math.fsum(p * math.log(p) for p in probs if p > 0)


@pytest.fixture(params=[2**24, 21])
def chunk(request, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", request.param)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 5.0])
def test_values_equal_those_of_loops(chunk, temperature):
    logits = torch.randn(11, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    targets = torch.arange(11) % 7
    log_probs, entropy, _ = token_log_probs(logits, targets, temperature)
    for i in range(11):
        expected = reference(logits[i].tolist(), int(targets[i]), temperature)
        assert log_probs[i].item() == pytest.approx(expected[0], rel=1e-10)
        assert entropy[i].item() == pytest.approx(expected[1], rel=1e-10)


def test_gradients_equal_numerical_gradients(chunk):
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 6, 3, 3, 2])
    assert torch.autograd.gradcheck(lambda x: token_log_probs(x, targets, 0.7, entropy_grad=True)[:2], (logits,))
    assert torch.autograd.gradcheck(lambda x: token_log_probs(x, targets, 0.7)[0], (logits,))


def test_entropy_has_no_gradient_by_default():
    logits = torch.randn(3, 4, requires_grad=True)
    log_probs, entropy, _ = token_log_probs(logits, torch.zeros(3, dtype=torch.int64), 1.0)
    assert log_probs.requires_grad and not entropy.requires_grad


def test_half_precision_is_computed_in_float32():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(2)).bfloat16().requires_grad_()
    targets = torch.arange(6)
    log_probs, *_ = token_log_probs(logits, targets, 0.5)
    expected = (logits.detach().double() / 0.5).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.double(), expected, rtol=1e-5, atol=1e-5)
    log_probs.sum().backward()
    assert logits.grad.dtype == torch.bfloat16


def test_extreme_logits_give_finite_gradients():
    logits = torch.tensor([[0.0, -math.inf, 0.0], [1e30, -1e30, 0.0]], requires_grad=True)
    log_probs, entropy, _ = token_log_probs(logits, torch.tensor([0, 0]), 0.5, entropy_grad=True)
    (log_probs.sum() + entropy.sum()).backward()
    torch.testing.assert_close(log_probs.detach(), torch.tensor([-math.log(2), 0.0]))
    torch.testing.assert_close(entropy.detach(), torch.tensor([math.log(2), 0.0]))
    assert torch.isfinite(logits.grad).all()


def test_empty_input_gives_empty_output():
    logits = torch.empty(0, 9, requires_grad=True)
    log_probs, entropy, _ = token_log_probs(logits, torch.empty(0, dtype=torch.int64), 1.0)
    log_probs.sum().backward()
    assert log_probs.shape == entropy.shape == (0,)


def test_nan_logits_give_nan():
    logits = torch.tensor([[0.0, math.nan]])
    assert torch.isnan(token_log_probs(logits, torch.tensor([0]), 1.0)[0]).all()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sum_of_squares_equals_that_of_a_loop(chunk, temperature):
    logits = torch.randn(11, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 4
    logits[3] = 2.0  # uniform distribution: 1 / 7
    logits[4, 2] = 1e3  # all probability on one token: 1
    targets = torch.arange(11) % 7
    log_probs, entropy, squares = token_log_probs(logits, targets, temperature, sum_pi_squared=True)
    for i in range(11):
        top = max(logits[i].tolist())
        weights = [math.exp((x - top) / temperature) for x in logits[i].tolist()]
        expected = sum((weight / sum(weights)) ** 2 for weight in weights)
        assert squares[i].item() == pytest.approx(expected, rel=1e-10)
    assert squares[3].item() == pytest.approx(1 / 7) and squares[4].item() == 1.0
    without = token_log_probs(logits, targets, temperature)
    assert torch.equal(log_probs, without[0]) and torch.equal(entropy, without[1]) and without[2] is None


def test_sum_of_squares_has_no_gradient():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(6), dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 6, 3, 3, 2])
    squares = token_log_probs(logits, targets, 0.7, sum_pi_squared=True)[2]
    assert not squares.requires_grad
    both = lambda x: token_log_probs(x, targets, 0.7, entropy_grad=True, sum_pi_squared=True)[:2]  # noqa: E731
    assert torch.autograd.gradcheck(both, (logits,))
