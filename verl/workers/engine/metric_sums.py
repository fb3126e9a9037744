"""Metrics of a mini-batch, summed over micro-batches and ranks by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist


class MeanShare(NamedTuple):
    """One micro-batch's contribution to a mean over the tokens of the mini-batch.

    The mean is taken over the micro-batches that have the metric: sum of the values / sum of the weights.

    Attributes:
        value: scalar, the mean over the tokens of the micro-batch times `weight`; 0 if `weight` is 0.
        weight: scalar, the micro-batch's share of the tokens of the mini-batch.
    """

    value: torch.Tensor
    weight: torch.Tensor


@dataclass
class _Sum:
    value: torch.Tensor | float = 0.0
    weight: torch.Tensor | float = 0.0
    plain: int = 0  # micro-batches that gave a share without a weight


class MetricSums:
    """Sums of the metrics of this rank's micro-batches."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sum] = {}

    def add(self, name: str, value: torch.Tensor | MeanShare | float) -> None:
        """Add one micro-batch's value of a metric: a share that is only summed, or a share of a mean."""
        entry = self._sums.setdefault(name, _Sum())
        if isinstance(value, MeanShare):
            entry.value, entry.weight = entry.value + value.value.detach(), entry.weight + value.weight.detach()
        else:
            entry.value, entry.plain = entry.value + torch.as_tensor(value).detach(), entry.plain + 1

    def reduce(self, group: dist.ProcessGroup | None, device: torch.device) -> dict[str, float]:
        """Return the metrics of the mini-batch, equal on all ranks. Collective.

        Ranks may have different metrics: a rank without a metric adds nothing to its sum and has no weight in its mean.
        A mean without any weight is left out. If some micro-batches gave a metric as a sum and others as a mean, the
        result is the sum of their shares.
        """
        # A user's policy loss names the metrics, so only a comparison by name pairs the right ones.
        by_rank: list[list[str] | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(by_rank, sorted(self._sums), group=group)
        names = sorted({name for names in by_rank for name in names or ()})
        # HCCL does not reduce float64.
        dtype = torch.float32 if device.type == "npu" else torch.float64
        rows = [self._sums.get(name, _Sum()) for name in names]
        values = torch.stack(
            [
                torch.stack([torch.as_tensor(part).to(device, dtype) for part in (row.value, row.weight, row.plain)])
                for row in rows
            ]
        )
        dist.all_reduce(values, group=group)
        metrics = {}
        for name, (value, weight, plain) in zip(names, values.tolist(), strict=True):
            if plain:
                metrics[name] = value
            elif weight:
                metrics[name] = value / weight
        return metrics
