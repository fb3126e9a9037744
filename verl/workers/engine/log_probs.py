"""Log-probabilities, entropies and sums of squares from logits, without a second copy of the logits in memory."""

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

    def of_rows(self, part: slice) -> KeptTokens:
        """Return the kept tokens of some rows."""
        return KeptTokens(self.ids[part], self.valid[part])

    def log_normalizers(self, scaled: torch.Tensor, log_z: torch.Tensor) -> torch.Tensor:
        """Return log sum exp of the logits `scaled` [N, V] over the kept tokens; without a mask that of `log_z` [N]."""
        return torch.where(self.valid.any(dim=1), self._values(scaled).logsumexp(dim=1), log_z)

    def probs(self, scaled: torch.Tensor, kept_log_z: torch.Tensor) -> torch.Tensor:
        """Return the probabilities [N, K] of the kept tokens, 0 for padding; `kept_log_z` by `log_normalizers`."""
        return (self._values(scaled) - kept_log_z.unsqueeze(1)).exp_()

    def _values(self, scaled: torch.Tensor) -> torch.Tensor:
        return scaled.gather(1, self.ids).masked_fill_(~self.valid, -torch.inf)


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
        rows = logits.shape[0]
        dtype = torch.promote_types(logits.dtype, torch.float32)
        log_probs, entropy, log_z = (torch.empty(rows, dtype=dtype, device=logits.device) for _ in range(3))
        sum_pi_squared = torch.empty_like(entropy) if squares else None
        # Normalizers of the log-probabilities: over the kept tokens of a row, or over all tokens.
        kept_log_z = log_z if kept is None else torch.empty_like(log_z)
        for part in _chunks(logits):
            scaled = _scaled(logits[part], temperature, dtype)
            log_z[part] = scaled.logsumexp(dim=-1)
            row_kept = None if kept is None else kept.of_rows(part)
            if row_kept is not None:
                kept_log_z[part] = row_kept.log_normalizers(scaled, log_z[part])
            log_probs[part] = scaled.gather(1, targets[part].unsqueeze(1)).squeeze(1) - kept_log_z[part]
            probs = (scaled - log_z[part].unsqueeze(1)).exp_()
            if sum_pi_squared is not None:
                sum_pi_squared[part] = torch.linalg.vector_norm(probs, dim=-1).square_()
                if row_kept is not None:
                    kept_squares = row_kept.probs(scaled, kept_log_z[part]).square_().sum(dim=1)
                    sum_pi_squared[part] = torch.where(row_kept.valid.any(dim=1), kept_squares, sum_pi_squared[part])
            entropy[part] = log_z[part] - probs.mul_(scaled).sum(dim=-1)
        ctx.save_for_backward(logits, targets, log_z, entropy, kept_log_z, *(kept or ()))
        ctx.temperature = temperature
        ctx.entropy_grad = entropy_grad
        constant = [] if entropy_grad else [entropy]
        ctx.mark_non_differentiable(*constant, *([] if sum_pi_squared is None else [sum_pi_squared]))
        return log_probs, entropy, sum_pi_squared

    @staticmethod
    def backward(
        ctx: Any, grad_log_probs: torch.Tensor, grad_entropy: torch.Tensor, _: torch.Tensor | None
    ) -> tuple[Any, ...]:
        logits, targets, log_z, entropy, kept_log_z, *masks = ctx.saved_tensors
        kept = KeptTokens(*masks) if masks else None
        grad = torch.empty_like(logits)
        for part in _chunks(logits):
            scaled = _scaled(logits[part], ctx.temperature, log_z.dtype)
            by_log_prob = grad_log_probs[part].unsqueeze(1)
            row_kept = None if kept is None else kept.of_rows(part)
            kept_probs = None if row_kept is None else row_kept.probs(scaled, kept_log_z[part])
            log_p = scaled.sub_(log_z[part].unsqueeze(1))
            probs = log_p.exp()
            if row_kept is None or kept_probs is None:
                d_scaled = probs * -by_log_prob
            else:
                d_scaled = probs * -by_log_prob.masked_fill(row_kept.valid.any(dim=1, keepdim=True), 0.0)
                d_scaled.scatter_add_(1, row_kept.ids, kept_probs.mul_(-by_log_prob))
            d_scaled.scatter_add_(1, targets[part].unsqueeze(1), by_log_prob)
            if ctx.entropy_grad:
                # dH/dz = -p (log p + H)
                d_scaled.sub_(log_p.add_(entropy[part].unsqueeze(1)).mul_(probs).mul_(grad_entropy[part].unsqueeze(1)))
            grad[part] = d_scaled.div_(ctx.temperature).to(grad.dtype)
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


def _chunks(logits: torch.Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    for start in range(0, logits.shape[0], step):
        yield slice(start, start + step)


def _scaled(logits: torch.Tensor, temperature: float, dtype: torch.dtype) -> torch.Tensor:
    scaled = logits.to(dtype, copy=True)
    if temperature != 1.0:
        scaled.div_(temperature)
    # With a logit of -inf, p * log p would be NaN instead of 0.
    return scaled.clamp_(min=torch.finfo(dtype).min)
