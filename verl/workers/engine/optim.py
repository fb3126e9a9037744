"""Optimizer, learning-rate schedule and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

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
    """Return the Euclidean norm, computed in float32, of a gradient that is split over the ranks of `group`.

    Args:
        grads: this rank's part, on `device` or the host.
        device: device of the group's collectives.
    """
    square = torch.zeros((), dtype=torch.float32, device=device)
    if grads:
        norms = torch._foreach_norm([grad.float() for grad in grads])
        square = torch.stack(norms).square().sum().to(device)
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(square, group=group)
    return math.sqrt(square.item()) if torch.isfinite(square) else float(square.item())


@torch.no_grad()
def clip_grads(grads: list[torch.Tensor], norm: float, max_norm: float) -> None:
    """Scale the gradients in place so that their norm is at most `max_norm`."""
    if grads and norm > max_norm:
        torch._foreach_mul_(grads, max_norm / (norm + 1e-6))


def make_optimizer(model: torch.nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Return AdamW over the parameters that have a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        trained,
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        weight_decay=config.weight_decay,
        fused=all(parameter.device.type in ("cpu", "cuda") for parameter in trained),
    )


def make_schedule(config: OptimConfig, run_steps: int) -> Callable[[int], float]:
    """Return the learning rate as a function of the training step.

    Args:
        run_steps: training steps of the run, the length of the schedule unless the config sets another.
    """
    configured = config.total_training_steps
    total = run_steps if configured is None or configured < 0 else configured
    warmup = warmup_steps(config, total)

    def lr_at(step: int) -> float:
        factor = lr_factor(
            step, kind=config.lr_scheduler_type, warmup=warmup, total=total, min_lr_ratio=config.min_lr_ratio or 0.0
        )
        return config.lr * factor

    return lr_at
