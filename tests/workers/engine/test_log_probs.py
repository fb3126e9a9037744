"""Log-probabilities, entropies and sums of squares from logits: values, gradients, chunks."""

import math

import pytest
import torch

from verl.workers.engine import log_probs as module
from verl.workers.engine.log_probs import KeptTokens, token_log_probs


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


# ---- sampling masks ----

# Kept tokens of each row; the first row has no mask, and 2 is the target of each of them.
KEPT = [[], [2], [2, 6, 0], [5, 2], [0, 1, 2, 3, 4, 5, 6]]


def kept_tokens(lists):
    width = max(map(len, lists))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in lists])
    return KeptTokens(ids, torch.arange(width) < torch.tensor([[len(row)] for row in lists]))


def masked_logits(dtype=torch.float64):
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(8), dtype=torch.float64).mul(3).to(dtype)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_masked_log_probs_are_those_of_the_kept_tokens(chunk, temperature):
    logits, targets = masked_logits(), torch.full((5,), 2)
    log_probs, entropy, squares = token_log_probs(
        logits, targets, temperature, sum_pi_squared=True, kept=kept_tokens(KEPT)
    )
    for i, kept in enumerate(KEPT):
        kept = kept or list(range(7))
        expected, _ = reference(logits[i, kept].tolist(), kept.index(2), temperature)
        probs = [math.exp(reference(logits[i, kept].tolist(), j, temperature)[0]) for j in range(len(kept))]
        assert log_probs[i].item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
        assert squares[i].item() == pytest.approx(sum(p * p for p in probs), rel=1e-10)
        # The entropy is that of the whole vocabulary.
        assert entropy[i].item() == pytest.approx(reference(logits[i].tolist(), 2, temperature)[1], rel=1e-10)


def test_masked_gradients_equal_those_of_an_independent_log_softmax(chunk):
    logits, targets = masked_logits().requires_grad_(), torch.full((5,), 2)
    weights = torch.tensor([0.3, -1.0, 2.0, 0.7, 1.1], dtype=torch.float64)
    log_probs = token_log_probs(logits, targets, 0.6, kept=kept_tokens(KEPT))[0]
    (found,) = torch.autograd.grad((log_probs * weights).sum(), logits)
    removed = torch.tensor([[bool(kept) and token not in kept for token in range(7)] for kept in KEPT])
    expected_log_probs = (logits / 0.6).masked_fill(removed, -math.inf).log_softmax(-1)[:, 2]
    (expected,) = torch.autograd.grad((expected_log_probs * weights).sum(), logits)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert not found[removed].any() and not found[1].any(), "a token without an alternative has no gradient"


def test_masked_gradients_with_entropy_equal_numerical_gradients(chunk):
    logits, targets, kept = masked_logits().requires_grad_(), torch.full((5,), 2), kept_tokens(KEPT)
    both = lambda x: token_log_probs(x, targets, 0.7, entropy_grad=True, kept=kept)[:2]  # noqa: E731
    assert torch.autograd.gradcheck(both, (logits,))


def test_masked_log_probs_of_half_precision_are_computed_in_float32():
    logits, targets, kept = masked_logits(torch.bfloat16).requires_grad_(), torch.full((5,), 2), kept_tokens(KEPT)
    log_probs = token_log_probs(logits, targets, 0.5, kept=kept)[0]
    expected = token_log_probs(logits.detach().double(), targets, 0.5, kept=kept)[0]
    torch.testing.assert_close(log_probs.double(), expected, rtol=1e-5, atol=1e-5)
    log_probs.sum().backward()
    assert logits.grad.dtype == torch.bfloat16


def test_kept_tokens_far_below_the_others_have_finite_log_probs():
    """After updates, other tokens may have all of the probability."""
    logits = torch.tensor([[0.0, -300.0, -301.0]], requires_grad=True)
    kept = kept_tokens([[1, 2]])
    (log_prob, *_) = token_log_probs(logits, torch.tensor([1]), 1.0, kept=kept)
    log_prob.sum().backward()
    # float32 numbers near 300 are 3e-5 apart.
    assert log_prob.item() == pytest.approx(-math.log1p(math.exp(-1.0)), abs=6e-5)
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, 0.26894142, -0.26894142]]), rtol=0, atol=6e-5)


def test_without_the_mask_the_mean_importance_ratio_is_the_kept_probability():
    """The expectation over the truncated distribution, on policy: ratio 1 and k3 0 with the mask, biased without it."""
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(9), dtype=torch.float64).mul(2)
    probs, order = logits[0].softmax(-1).sort(descending=True)
    size = int((probs.cumsum(0) < 0.9).sum()) + 1  # top_p=0.9
    kept_mass, kept = probs[:size].sum().item(), order[:size]
    rollout = logits[0, kept].log_softmax(-1)
    rows, masks = logits.expand(size, -1), kept_tokens([kept.tolist()] * size)

    def on_policy(masks):
        d = token_log_probs(rows, kept, 1.0, kept=masks)[0] - rollout
        return [(rollout.exp() * value).sum().item() for value in (d.exp(), d.exp() - 1 - d)]

    assert on_policy(masks) == pytest.approx([1.0, 0.0], abs=1e-14)
    assert 0.9 <= kept_mass < 0.95
    assert on_policy(None) == pytest.approx([kept_mass, kept_mass - 1 - math.log(kept_mass)], rel=1e-10)
