"""Log-probabilities, entropies and sums of squares from logits, without a second copy of the logits in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

_CHUNK_ELEMENTS = 2**24  # 64 MiB for the float32 working copy


class _TokenLogProbs(torch.autograd.Function):
    """Compute log softmax(logits / temperature)[target], entropy and sum of squares of each row, in chunks of rows."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, temperature: float, entropy_grad: bool, squares: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        rows = logits.shape[0]
        dtype = torch.promote_types(logits.dtype, torch.float32)
        log_probs, entropy, log_z = (torch.empty(rows, dtype=dtype, device=logits.device) for _ in range(3))
        sum_pi_squared = torch.empty_like(entropy) if squares else None
        for part in _chunks(logits):
            scaled = _scaled(logits[part], temperature, dtype)
            log_z[part] = scaled.logsumexp(dim=-1)
            log_probs[part] = scaled.gather(1, targets[part].unsqueeze(1)).squeeze(1) - log_z[part]
            probs = (scaled - log_z[part].unsqueeze(1)).exp_()
            if sum_pi_squared is not None:
                sum_pi_squared[part] = torch.linalg.vector_norm(probs, dim=-1).square_()
            entropy[part] = log_z[part] - probs.mul_(scaled).sum(dim=-1)
        ctx.save_for_backward(logits, targets, log_z, entropy)
        ctx.temperature = temperature
        ctx.entropy_grad = entropy_grad
        constant = [] if entropy_grad else [entropy]
        ctx.mark_non_differentiable(*constant, *([] if sum_pi_squared is None else [sum_pi_squared]))
        return log_probs, entropy, sum_pi_squared

    @staticmethod
    def backward(
        ctx: Any, grad_log_probs: torch.Tensor, grad_entropy: torch.Tensor, _: torch.Tensor | None
    ) -> tuple[Any, ...]:
        logits, targets, log_z, entropy = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for part in _chunks(logits):
            log_p = _scaled(logits[part], ctx.temperature, log_z.dtype).sub_(log_z[part].unsqueeze(1))
            probs = log_p.exp()
            by_log_prob = grad_log_probs[part].unsqueeze(1)
            d_scaled = probs * -by_log_prob
            d_scaled.scatter_add_(1, targets[part].unsqueeze(1), by_log_prob)
            if ctx.entropy_grad:
                # dH/dz = -p (log p + H)
                d_scaled.sub_(log_p.add_(entropy[part].unsqueeze(1)).mul_(probs).mul_(grad_entropy[part].unsqueeze(1)))
            grad[part] = d_scaled.div_(ctx.temperature).to(grad.dtype)
        return grad, None, None, None, None


def token_log_probs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    *,
    entropy_grad: bool = False,
    sum_pi_squared: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return log-probabilities of `targets`, entropies and sums of squares of pi = softmax(logits / temperature).

    Args:
        logits: [N, V], any floating dtype.
        targets: [N] int64.
        entropy_grad: make the entropy differentiable.
        sum_pi_squared: also compute the sum of pi(v)^2 over the vocabulary, without a gradient.

    Returns:
        three [N] tensors in float32 (float64 for float64 logits); the third is None without `sum_pi_squared`.
    """
    return _TokenLogProbs.apply(logits, targets, temperature, entropy_grad, sum_pi_squared)


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
