"""Tokens by the covariance of advantage and log-probability, which drives the loss of entropy (arXiv:2505.22617).

Means and counts are those of a whole mini-batch. Everything is computed in float64 on the CPU, so that the choice does
not depend on the device.
"""

from __future__ import annotations

import torch


def token_covariance(log_prob: torch.Tensor, advantages: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """(A - mean A)(log p - mean log p) of each of the n tokens with a mask, row by row: [n] float64.

    Args:
        log_prob, advantages, response_mask: [B, T] of a whole mini-batch.
    """
    mask = response_mask.bool()
    log_prob, advantages = (values.detach()[mask].cpu().double() for values in (log_prob, advantages))
    return (advantages - advantages.mean()) * (log_prob - log_prob.mean())


def mark(response_mask: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """[B, T] bool: True at those of the n tokens with a mask that `chosen` numbers, row by row."""
    mask = response_mask.bool()
    flat = torch.zeros(int(mask.sum()), dtype=torch.bool)
    flat[chosen] = True
    marked = torch.zeros_like(mask)
    marked[mask] = flat.to(mask.device)
    return marked


def needed(selected_tokens: torch.Tensor | None, loss_mode: str) -> torch.Tensor:
    """`selected_tokens` as bool.

    Raises:
        ValueError: it is None.
    """
    if selected_tokens is None:
        raise ValueError(
            f"selected_tokens=None: {loss_mode} chooses its tokens over the whole mini-batch; call "
            f"get_token_selector({loss_mode!r}) on it and pass the rows that belong to this part"
        )
    return selected_tokens.bool()
