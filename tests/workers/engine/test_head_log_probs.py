"""Log-probabilities from hidden states and head weight, compared with log_softmax of complete float64 logits."""

import itertools

import pytest
import torch

from verl.workers.engine import head_log_probs as module
from verl.workers.engine.head_log_probs import HeadTerm, head_log_probs
from verl.workers.engine.log_probs import KeptTokens
from verl.workers.engine.logits_function import LogitsFunction

ROWS, VOCABULARY, HIDDEN = 7, 23, 5
FUNCTIONS = [LogitsFunction(), LogitsFunction(0.25), LogitsFunction(1.5, 3.0)]


@pytest.fixture(params=[(4096, 2**23), (3, 12), (2, 1)], ids=["one tile", "tiles of 3x4", "single columns"])
def tiles(request, monkeypatch):
    rows, elements = request.param
    monkeypatch.setattr(module, "_TILE_ROWS", rows)
    monkeypatch.setattr(module, "TILE_ELEMENTS", elements)


def random(*shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def factors(dtype=torch.float64):
    """Return hidden states and weight of the head, the same of an adapter of rank 2, and the bias."""
    head = random(ROWS, HIDDEN, seed=0, dtype=dtype), random(VOCABULARY, HIDDEN, seed=1, dtype=dtype)
    adapter = random(ROWS, 2, seed=2, dtype=dtype), random(VOCABULARY, 2, seed=3, dtype=dtype)
    return *head, *adapter, random(VOCABULARY, seed=4, dtype=dtype)


TARGETS = torch.tensor([0, 22, 11, 3, 3, 12, 21])
# The fourth row has no mask; every mask contains the target.
KEPT = [[0, 4, 22], [22], [11, 3], [], [*range(23)], [20, 12], [21, 1, 2, 3]]


def kept_tokens():
    width = max(map(len, KEPT))
    ids = torch.tensor([row + [5] * (width - len(row)) for row in KEPT])
    return KeptTokens(ids, torch.arange(width) < torch.tensor([[len(row)] for row in KEPT]))


def reference(x, w, a, b, bias, temperature, function, masked=False):
    """Return log-probabilities, entropies and sums of squares [N] in float64, by torch's operators."""
    logits = x.double() @ w.double().T + a.double() @ b.double().T + bias.double()
    logits = logits * function.scale
    if function.cap is not None:
        logits = function.cap * torch.tanh(logits / function.cap)
    log_p = (logits / temperature).log_softmax(-1)
    removed = torch.tensor([[masked and bool(row) and token not in row for token in range(VOCABULARY)] for row in KEPT])
    restricted = (logits / temperature).masked_fill(removed, -torch.inf).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return restricted.gather(1, TARGETS[:, None])[:, 0], entropy, restricted.exp().square().sum(-1)


def computed(x, w, a, b, bias, temperature, function, masked=False, **options):
    kept = kept_tokens() if masked else None
    terms = [HeadTerm(x, w), HeadTerm(a, b)]
    return head_log_probs(
        terms, bias, TARGETS, temperature, function=function, kept=kept, sum_pi_squared=True, **options
    )


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("temperature", "masked"), [(1.0, False), (0.6, True)])
def test_values_and_gradients_equal_those_of_complete_logits(tiles, function, temperature, masked):
    given = factors()
    found = computed(*given, temperature, function, masked, entropy_grad=True)
    expected = reference(*given, temperature, function, masked)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    weights = random(2, ROWS, seed=5).detach()
    gradients = [
        torch.autograd.grad((log_probs * weights[0] + entropy * weights[1]).sum(), given)
        for log_probs, entropy, _ in (found, expected)
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_equal_numerical_gradients(tiles, masked):
    both = lambda *given: computed(*given, 0.7, FUNCTIONS[2], masked, entropy_grad=True)[:2]  # noqa: E731
    assert torch.autograd.gradcheck(both, factors(), fast_mode=True)


def test_the_entropy_and_the_sum_of_squares_have_no_gradient_by_default():
    log_probs, entropy, squares = computed(*factors(), 1.0, LogitsFunction())
    assert log_probs.requires_grad and not entropy.requires_grad and not squares.requires_grad


def test_a_frozen_factor_gets_no_gradient(tiles):
    """With an adapter on the head, only hidden states and the adapter are trained."""
    x, w, a, b, bias = factors()
    w.requires_grad_(False), bias.requires_grad_(False)
    computed(x, w, a, b, bias, 1.0, LogitsFunction())[0].sum().backward()
    assert w.grad is None and bias.grad is None
    expected = torch.autograd.grad(reference(x, w, a, b, bias, 1.0, LogitsFunction())[0].sum(), (x, a, b))
    for one, other in zip((x.grad, a.grad, b.grad), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 3e-2)])
def test_lower_precision_is_summed_in_float32(tiles, dtype, tolerance):
    given = factors(dtype)
    log_probs, entropy, _ = computed(*given, 0.6, LogitsFunction(), entropy_grad=True)
    assert log_probs.dtype == entropy.dtype == torch.float32
    expected = reference(*given, 0.6, LogitsFunction())
    torch.testing.assert_close(log_probs.double(), expected[0], rtol=tolerance, atol=tolerance)
    found = torch.autograd.grad((log_probs + entropy).sum(), given)
    wanted = torch.autograd.grad((expected[0] + expected[1]).sum(), given)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance * 2)


def test_no_rows_give_zero_gradients():
    x, w = random(0, HIDDEN, seed=0), random(VOCABULARY, HIDDEN, seed=1)
    log_probs, entropy, _ = head_log_probs([HeadTerm(x, w)], None, TARGETS[:0], 1.0)
    log_probs.sum().backward()
    assert log_probs.shape == entropy.shape == (0,) and x.grad.shape == (0, HIDDEN)
    assert w.grad.shape == w.shape and not w.grad.any()


def test_nan_hidden_states_give_nan(tiles):
    x, w = random(ROWS, HIDDEN, seed=0).detach(), random(VOCABULARY, HIDDEN, seed=1)
    x[2, 1] = torch.nan
    log_probs, entropy, _ = head_log_probs([HeadTerm(x, w)], None, TARGETS, 1.0)
    assert torch.isnan(log_probs).tolist() == torch.isnan(entropy).tolist() == [i == 2 for i in range(ROWS)]


def test_far_logits_in_different_tiles_do_not_overflow(tiles):
    """The largest logit of a row comes last, first or in between."""
    for order in itertools.permutations([0.0, 500.0, -800.0, 3e4]):
        weight = torch.tensor(order).unsqueeze(1).requires_grad_()
        hidden = torch.ones(1, 1, requires_grad=True)
        target = torch.tensor([order.index(500.0)])
        log_probs, entropy, squares = head_log_probs(
            [HeadTerm(hidden, weight)], None, target, 1.0, entropy_grad=True, sum_pi_squared=True
        )
        (log_probs + entropy).sum().backward()
        assert [log_probs.item(), entropy.item(), squares.item()] == [500.0 - 3e4, 0.0, 1.0]
        expected = [float(value == 500.0) - float(value == 3e4) for value in order]
        assert weight.grad[:, 0].tolist() == expected
