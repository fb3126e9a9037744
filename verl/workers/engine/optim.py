"""Learning-rate schedule and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from verl.config import OptimConfig

SCHEDULES = ("constant", "cosine")


def warmup_steps(optim: OptimConfig, total_training_steps: int) -> int:
    """Return the number of linear warm-up steps.

    It is `lr_warmup_steps`, or `lr_warmup_steps_ratio` of all steps if `lr_warmup_steps` is None or negative.
    """
    if optim.lr_warmup_steps is not None and optim.lr_warmup_steps >= 0:
        return int(optim.lr_warmup_steps)
    return int(optim.lr_warmup_steps_ratio * total_training_steps)


def lr_factor(step: int, *, kind: str, warmup: int, total: int, min_lr_ratio: float = 0.0) -> float:
    """Return the factor of the base learning rate in training step `step`, counted from 0.

    The factor rises linearly from 0 over `warmup` steps. After that it is 1 (`constant`), or falls along half a cosine
    to `min_lr_ratio` at step `total` (`cosine`).

    Raises:
        ValueError: unknown schedule.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"unknown optim.lr_scheduler_type={kind!r}: use one of {', '.join(SCHEDULES)}")
    if step < warmup:
        return step / warmup
    if kind == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


def local_grads(parameters: Iterable[torch.nn.Parameter]) -> list[torch.Tensor]:
    """Return this rank's shards of the gradients."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]


@torch.no_grad()
def global_grad_norm(grads: list[torch.Tensor], group: dist.ProcessGroup | None, device: torch.device) -> float:
    """Return the Euclidean norm, computed in float32, of a gradient that is split over the ranks of `group`."""
    square = torch.zeros((), dtype=torch.float32, device=device)
    if grads:
        norms = torch._foreach_norm([grad.float() for grad in grads])
        square = torch.stack(norms).square().sum()
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(square, group=group)
    return math.sqrt(square.item()) if torch.isfinite(square) else float(square.item())


@torch.no_grad()
def clip_grads(grads: list[torch.Tensor], norm: float, max_norm: float) -> None:
    """Scale the gradients in place so that their norm is at most `max_norm`."""
    if grads and norm > max_norm:
        torch._foreach_mul_(grads, max_norm / (norm + 1e-6))
