"""Log-probabilities, entropies and sums of squares of a softmax over logits that are present one tile at a time.

A tile is a block of rows and columns of the logits. The statistics of a row need one pass over its tiles (the online
softmax of Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"), and the gradient one more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

_CHUNK_ELEMENTS = 2**24  # 64 MiB for the float32 working copy


class KeptTokens(NamedTuple):
    """The tokens that a truncated sampler kept, for each of N rows of logits. A row without a valid id has no mask.

    Attributes:
        ids: [N, K] int64, token ids, padded with any token.
        valid: [N, K] bool, False for padding.
    """

    ids: torch.Tensor
    valid: torch.Tensor


class Softmax(NamedTuple):
    """The result of `SoftmaxStatistics`, from which gradients follow: tensors of N rows in the dtype of the statistics.

    Attributes:
        targets: [N] int64.
        log_z: [N] log sum exp over the whole vocabulary.
        entropy: [N].
        kept_log_z: [N] log sum exp over the kept tokens; `log_z` for a row without a mask.
        kept_ids, kept_valid: the fields of `KeptTokens`; None without masks.
    """

    targets: torch.Tensor
    log_z: torch.Tensor
    entropy: torch.Tensor
    kept_log_z: torch.Tensor
    kept_ids: torch.Tensor | None = None
    kept_valid: torch.Tensor | None = None

    def gradient_(
        self, scaled: torch.Tensor, rows: slice, start: int, by_log_prob: torch.Tensor, by_entropy: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the gradient [n, w] of a tile of scaled logits, whose memory is overwritten.

        Args:
            scaled: [n, w], the tile of `rows` that begins at column `start`.
            by_log_prob, by_entropy: [N], derivatives of the loss; None for an entropy without a gradient.
        """
        at_target = by_log_prob[rows].unsqueeze(1)
        spread = at_target
        if self.kept_ids is not None and self.kept_valid is not None:
            kept, inside = _columns(self.kept_ids[rows], start, scaled.shape[1])
            inside &= self.kept_valid[rows]
            kept_probs = scaled.gather(1, kept).sub_(self.kept_log_z[rows].unsqueeze(1))
            kept_probs = kept_probs.masked_fill_(~inside, -torch.inf).exp_()
            spread = spread.masked_fill(self.kept_valid[rows].any(dim=1, keepdim=True), 0.0)
        log_p = scaled.sub_(self.log_z[rows].unsqueeze(1))
        gradient = log_p.exp()
        if by_entropy is not None:
            # dH/dz = -p (log p + H)
            log_p.add_(self.entropy[rows].unsqueeze(1)).mul_(gradient).mul_(by_entropy[rows].unsqueeze(1))
        gradient.mul_(-spread)
        if by_entropy is not None:
            gradient.sub_(log_p)
        if self.kept_ids is not None:
            gradient.scatter_add_(1, kept, kept_probs.mul_(-at_target))
        target, inside = _columns(self.targets[rows].unsqueeze(1), start, scaled.shape[1])
        return gradient.scatter_add_(1, target, torch.where(inside, at_target, 0.0))


class SoftmaxStatistics:
    """Collects the statistics of N rows of scaled logits from their tiles, in any order.

    Args:
        targets: [N] int64, the tokens whose log-probabilities are needed.
        kept: the kept tokens of each row; None for the whole vocabulary.
        dtype: dtype of the tiles and of the results, float32 or float64.
        squares: also collect the sums of squares.
    """

    def __init__(self, targets: torch.Tensor, kept: KeptTokens | None, dtype: torch.dtype, squares: bool):
        self._targets, self._kept = targets, kept
        zeros = torch.zeros(len(targets), dtype=dtype, device=targets.device)
        self._top = torch.full_like(zeros, torch.finfo(dtype).min)
        # Relative to the largest logit so far: sum of exp(z), of exp(z) * z, and of exp(z)^2.
        self._mass, self._moment = zeros.clone(), zeros.clone()
        self._squares = zeros.clone() if squares else None
        self._target_logits = zeros
        self._kept_logits = None
        if kept is not None:
            self._kept_logits = torch.full(kept.ids.shape, -torch.inf, dtype=dtype, device=targets.device)

    def add_(self, scaled: torch.Tensor, rows: slice, start: int) -> None:
        """Add the tile [n, w] of `rows` that begins at column `start`; its memory is overwritten."""
        width = scaled.shape[1]
        target, inside = _columns(self._targets[rows].unsqueeze(1), start, width)
        found = torch.where(inside, scaled.gather(1, target), self._target_logits[rows].unsqueeze(1))
        self._target_logits[rows] = found.squeeze(1)
        if self._kept is not None and self._kept_logits is not None:
            kept, inside = _columns(self._kept.ids[rows], start, width)
            inside &= self._kept.valid[rows]
            self._kept_logits[rows] = torch.where(inside, scaled.gather(1, kept), self._kept_logits[rows])
        old_top = self._top[rows]
        top = torch.maximum(old_top, scaled.amax(dim=1))
        lower = (old_top - top).clamp_(min=torch.finfo(top.dtype).min)  # not -inf, which times 0 is NaN
        shrink = lower.exp()
        scaled.sub_(top.unsqueeze(1))
        weights = scaled.exp()
        if self._squares is not None:
            added = torch.linalg.vector_norm(weights, dim=1).square_()
            self._squares[rows] = self._squares[rows] * shrink.square() + added
        self._moment[rows] = (self._moment[rows] + lower * self._mass[rows]) * shrink + scaled.mul_(weights).sum(dim=1)
        self._mass[rows] = self._mass[rows] * shrink + weights.sum(dim=1)
        self._top[rows] = top

    def result(self) -> tuple[torch.Tensor, torch.Tensor | None, Softmax]:
        """Return the log-probabilities [N] of the targets, the sums of squares [N] and the rest, after all tiles."""
        log_mass = self._mass.log()
        log_z, entropy = self._top + log_mass, log_mass - self._moment / self._mass
        squares = None if self._squares is None else self._squares / self._mass.square()
        if self._kept is None or self._kept_logits is None:
            return self._target_logits - log_z, squares, Softmax(self._targets, log_z, entropy, log_z)
        masked = self._kept.valid.any(dim=1)
        kept_log_z = torch.where(masked, self._kept_logits.logsumexp(dim=1), log_z)
        if squares is not None:
            kept_probs = (self._kept_logits - kept_log_z.unsqueeze(1)).exp_()
            squares = torch.where(masked, kept_probs.square_().sum(dim=1), squares)
        softmax = Softmax(self._targets, log_z, entropy, kept_log_z, *self._kept)
        return self._target_logits - kept_log_z, squares, softmax


class _TokenLogProbs(torch.autograd.Function):
    """Compute log softmax(logits / temperature)[target], entropy and sum of squares of each row, in chunks of rows."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        entropy_grad: bool,
        squares: bool,
        kept: KeptTokens | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        statistics = SoftmaxStatistics(targets, kept, statistics_dtype(logits.dtype), squares)
        for rows in _chunks(logits):
            statistics.add_(scale_logits(logits[rows], temperature), rows, 0)
        log_probs, sum_pi_squared, softmax = statistics.result()
        ctx.save_for_backward(logits, *softmax)
        ctx.temperature, ctx.entropy_grad = temperature, entropy_grad
        mark_statistics(ctx, softmax.entropy, sum_pi_squared, entropy_grad)
        return log_probs, softmax.entropy, sum_pi_squared

    @staticmethod
    def backward(
        ctx: Any, grad_log_probs: torch.Tensor, grad_entropy: torch.Tensor, _: torch.Tensor | None
    ) -> tuple[Any, ...]:
        logits, *saved = ctx.saved_tensors
        softmax = Softmax(*saved)
        grad = torch.empty_like(logits)
        for rows in _chunks(logits):
            scaled = scale_logits(logits[rows], ctx.temperature)
            part = softmax.gradient_(scaled, rows, 0, grad_log_probs, grad_entropy if ctx.entropy_grad else None)
            grad[rows] = part.div_(ctx.temperature).to(grad.dtype)
        return grad, None, None, None, None, None


def token_log_probs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    *,
    entropy_grad: bool = False,
    sum_pi_squared: bool = False,
    kept: KeptTokens | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return log-probabilities of `targets`, entropies and sums of squares of pi = softmax(logits / temperature).

    With `kept`, log-probabilities and sums of squares are those of the truncated distribution: pi of the kept tokens,
    divided by their sum. The entropy is that of pi.

    Args:
        logits: [N, V], any floating dtype.
        targets: [N] int64; with `kept`, each is one of the kept tokens of its row.
        entropy_grad: make the entropy differentiable.
        sum_pi_squared: also compute the sum of the squared probabilities, without a gradient.
        kept: the kept tokens of each row; None for the whole vocabulary.

    Returns:
        three [N] tensors in float32 (float64 for float64 logits); the third is None without `sum_pi_squared`.
    """
    return _TokenLogProbs.apply(logits, targets, temperature, entropy_grad, sum_pi_squared, kept)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the softmax of logits of a dtype is computed."""
    return torch.promote_types(dtype, torch.float32)


def scale_logits(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return a copy of a tile of logits, divided by the temperature, in the dtype of the statistics."""
    dtype = statistics_dtype(logits.dtype)
    scaled = logits.to(dtype, copy=True)
    if temperature != 1.0:
        scaled.div_(temperature)
    # With a logit of -inf, p * log p would be NaN instead of 0.
    return scaled.clamp_(min=torch.finfo(dtype).min)


def mark_statistics(ctx: Any, entropy: torch.Tensor, sum_pi_squared: torch.Tensor | None, entropy_grad: bool) -> None:
    """Mark the outputs of a torch.autograd.Function that have no gradient."""
    constant = [] if entropy_grad else [entropy]
    ctx.mark_non_differentiable(*constant, *([] if sum_pi_squared is None else [sum_pi_squared]))


def _chunks(logits: torch.Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    for start in range(0, logits.shape[0], step):
        yield slice(start, start + step)


def _columns(ids: torch.Tensor, start: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the columns of token ids in a tile, any column for a token outside, and True for the tokens inside."""
    columns = ids - start
    inside = (columns >= 0) & (columns < width)
    return columns.clamp_(0, width - 1), inside
