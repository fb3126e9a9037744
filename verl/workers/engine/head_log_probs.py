"""Log-probabilities from hidden states and the weight of an output head, without the logits of all rows in memory.

The logits are computed in tiles of rows and of the vocabulary, reduced to statistics of each row, and dropped. The
backward pass computes each tile again, which costs one more product of hidden states and weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from verl.workers.engine.log_probs import (
    KeptTokens,
    Softmax,
    SoftmaxStatistics,
    mark_statistics,
    scale_logits,
    statistics_dtype,
)
from verl.workers.engine.logits_function import LogitsFunction

TILE_ELEMENTS = 2**23  # 32 MiB in float32; a pass works with up to four tiles
_TILE_ROWS = 4096


class HeadTerm(NamedTuple):
    """A product hidden @ weight.T in the logits: hidden [N, H] of the rows, and weight [V, H] in the same dtype."""

    hidden: torch.Tensor
    weight: torch.Tensor


class _Options(NamedTuple):
    """Arguments that are no tensors."""

    temperature: float
    function: LogitsFunction
    entropy_grad: bool
    squares: bool


class _HeadLogProbs(torch.autograd.Function):
    """The function of `head_log_probs`; the terms' tensors are flattened into `factors`."""

    @staticmethod
    def forward(
        ctx: Any,
        options: _Options,
        targets: torch.Tensor,
        kept: KeptTokens | None,
        bias: torch.Tensor | None,
        *factors: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        terms = _terms(factors)
        statistics = SoftmaxStatistics(targets, kept, statistics_dtype(factors[0].dtype), options.squares)
        blocks, pieces = _tiles(len(targets), *factors[1].shape)
        for columns in pieces:
            for rows in blocks:
                logits = _logits(terms, bias, rows, columns, options.function)
                statistics.add_(scale_logits(logits, options.temperature), rows, columns.start)
        log_probs, sum_pi_squared, softmax = statistics.result()
        ctx.save_for_backward(*softmax, bias, *factors)
        ctx.options = options
        mark_statistics(ctx, softmax.entropy, sum_pi_squared, options.entropy_grad)
        return log_probs, softmax.entropy, sum_pi_squared

    @staticmethod
    def backward(
        ctx: Any, grad_log_probs: torch.Tensor, grad_entropy: torch.Tensor, _: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        size = len(Softmax._fields)
        softmax, bias = Softmax(*ctx.saved_tensors[:size]), ctx.saved_tensors[size]
        terms, options = _terms(ctx.saved_tensors[size + 1 :]), ctx.options
        by_entropy = grad_entropy if options.entropy_grad else None
        sums = _Gradients(terms, bias, ctx.needs_input_grad[3:])
        blocks, pieces = _tiles(len(softmax.targets), *terms[0].weight.shape)
        for columns in pieces:
            sums.begin(columns)
            for rows in blocks:
                logits = _logits(terms, bias, rows, columns, options.function)
                scaled = scale_logits(logits, options.temperature)
                grad = softmax.gradient_(scaled, rows, columns.start, grad_log_probs, by_entropy)
                grad = options.function.backward_(grad.div_(options.temperature), logits)
                sums.add(grad, rows, columns)
            sums.finish(columns)
        return None, None, None, *sums.result()


class _Gradients:
    """Sums the gradients of bias and factors over tiles, in float32 (float64 for float64 factors).

    Args:
        needs: True for the bias and for each factor that needs a gradient.
    """

    def __init__(self, terms: Sequence[HeadTerm], bias: torch.Tensor | None, needs: Sequence[bool]):
        self._terms, self._bias = terms, bias
        self._exact = statistics_dtype(terms[0].hidden.dtype)
        needs_bias, *others = needs
        self._by_bias = torch.zeros_like(bias, dtype=self._exact) if bias is not None and needs_bias else None
        self._by_hidden = [
            torch.zeros_like(term.hidden, dtype=self._exact) if need else None
            for term, need in zip(terms, others[::2], strict=True)
        ]
        self._by_weight = [
            torch.empty_like(term.weight) if need else None for term, need in zip(terms, others[1::2], strict=True)
        ]
        self._rows_of_weight: list[torch.Tensor | None] = []

    def begin(self, columns: slice) -> None:
        """Begin the tiles of a piece of the vocabulary."""
        self._rows_of_weight = [
            None if whole is None else torch.zeros_like(whole[columns], dtype=self._exact) for whole in self._by_weight
        ]

    def add(self, grad: torch.Tensor, rows: slice, columns: slice) -> None:
        """Add the gradient [n, w] of a tile of logits before the model's function."""
        if self._by_bias is not None:
            self._by_bias[columns] += grad.sum(dim=0)
        grad = grad.to(self._terms[0].hidden.dtype)
        for term, hidden, weight in zip(self._terms, self._by_hidden, self._rows_of_weight, strict=True):
            if hidden is not None:
                _add_product_(hidden[rows], grad, term.weight[columns])
            if weight is not None:
                _add_product_(weight, grad.T, term.hidden[rows])

    def finish(self, columns: slice) -> None:
        """Store the gradient of a piece of the vocabulary."""
        for whole, part in zip(self._by_weight, self._rows_of_weight, strict=True):
            if whole is not None and part is not None:
                whole[columns] = part

    def result(self) -> list[torch.Tensor | None]:
        """Return the gradients of the bias and of each factor, in the dtype of the factor."""
        gradients = [self._by_bias if self._by_bias is None else self._by_bias.to(self._terms[0].hidden.dtype)]
        for term, hidden, weight in zip(self._terms, self._by_hidden, self._by_weight, strict=True):
            gradients += [None if hidden is None else hidden.to(term.hidden.dtype), weight]
        return gradients


def head_log_probs(
    terms: Sequence[HeadTerm],
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    *,
    function: LogitsFunction | None = None,
    entropy_grad: bool = False,
    sum_pi_squared: bool = False,
    kept: KeptTokens | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return what `token_log_probs` returns for the logits function(sum of hidden @ weight.T + bias).

    Logits are rounded to the dtype of the terms, as by a linear layer; their softmax, and sums of gradients over tiles,
    are computed in float32 (float64 for float64 terms). Apart from results and gradients, a pass needs a few tiles of
    `TILE_ELEMENTS`, and the backward pass the gradient of the hidden states in float32.

    Args:
        terms: one for the head, and a second one for an adapter.
        bias: [V] or None.
        targets, temperature, entropy_grad, sum_pi_squared, kept: as in `token_log_probs`.
        function: what the model does with the logits of its head.
    """
    options = _Options(temperature, function or LogitsFunction(), entropy_grad, sum_pi_squared)
    factors = [tensor for term in terms for tensor in term]
    return _HeadLogProbs.apply(options, targets, kept, bias, *factors)


def _terms(factors: Sequence[torch.Tensor]) -> list[HeadTerm]:
    return [HeadTerm(*pair) for pair in zip(factors[::2], factors[1::2], strict=True)]


def _tiles(rows: int, columns: int, hidden: int) -> tuple[list[slice], list[slice]]:
    """Return the blocks of rows and the pieces of the vocabulary whose products are the tiles.

    A piece of the weight has at most as many elements as a tile, too.
    """
    height = max(1, min(rows, _TILE_ROWS))
    width = max(1, TILE_ELEMENTS // max(height, hidden))
    return _slices(rows, height), _slices(columns, width)


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _logits(
    terms: Sequence[HeadTerm], bias: torch.Tensor | None, rows: slice, columns: slice, function: LogitsFunction
) -> torch.Tensor:
    """Return a tile of the model's logits in the dtype of the terms."""
    (hidden, weight), *others = terms
    logits = F.linear(hidden[rows], weight[columns], None if bias is None else bias[columns])
    for other, factor in others:
        logits += F.linear(other[rows], factor[columns])
    return function.apply_(logits)


def _add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)
