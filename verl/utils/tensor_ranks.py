"""Tensor parallelism: neighboring ranks hold parts of each layer's weights, and compute parts of its output.

    columns    a rank holds some of the outputs of a linear layer, and computes them from the whole input
    rows       a rank holds the inputs of a linear layer that it has computed, and its share of the sum over inputs
    experts    a rank holds some of the experts, and computes the tokens that are routed to them

Everything between the layers, such as the residual stream, is the same on all ranks of a group: they hold the same
samples and compute the same loss. A rank's gradient of such a tensor lacks the parts that the layers of the other ranks
contribute, so it is summed where the layers begin; the outputs are summed where they end.

Source: Shoeybi et al., Megatron-LM (arXiv:1909.08053).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from verl.utils.rank_group import RankGroup

Forward = Callable[..., torch.Tensor]


class TensorRanks(RankGroup):
    """The ranks that share each layer of a model with this rank."""

    def columns(self, forward: Forward, inputs: SharedInputs) -> Forward:
        """Return the forward function of a linear layer with this rank's outputs, whose input all ranks have."""
        return lambda x: forward(inputs.of(x, self))

    def rows(self, forward: Forward) -> Forward:
        """Return the forward function of a linear layer without a bias, with this rank's inputs."""
        return lambda x: self.sum(forward(x))

    def experts(self, forward: Forward, count: int, inputs: SharedInputs) -> Forward:
        """Return the forward function of experts [T, H], [T, top k], [T, top k] -> [T, H] with those of this rank.

        Args:
            forward: computes with numbers of experts from 0; `count` stands for an expert of another rank.
            count: experts of each rank.
        """

        def experts(hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            local = index - self.rank * count
            elsewhere = (local < 0) | (local >= count)
            local = local.masked_fill(elsewhere, count)
            # FSDP reduces gradients on all ranks or none, so every rank computes a row, if only with the weight 0.
            local[0, 0] = torch.where(elsewhere[0, 0], 0, local[0, 0])
            own_weights = self.copy(weights).masked_fill(elsewhere, 0)
            return self.sum(forward(inputs.of(hidden_states, self), local, own_weights))

        return experts

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        """Return x, whose gradient is summed over the ranks. Collective in the backward pass."""
        return _Copy.apply(x, self._group) if torch.is_grad_enabled() and x.requires_grad else x

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum over the ranks, whose gradient is that of each summand. Collective in the forward pass."""
        return _Sum.apply(x, self._group)

    def to_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Exchange columns [n, k] of rows that ranks divide for whole rows [n / size, k * size]. Collective.

        Rank r receives the r-th part of the rows, whose number the ranks divide. The columns are ordered by rank.
        """
        sent = x.contiguous().view(torch.uint8)  # collectives do not support float8
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self._group)
        rows = received.unflatten(0, (self.size, -1)).transpose(0, 1).flatten(1)
        return rows.contiguous().view(x.dtype)

    def sum_(self, x: torch.Tensor) -> None:
        """Sum over the ranks in place, without a gradient. Collective."""
        dist.all_reduce(x, group=self._group)


class SharedInputs:
    """Inputs of layers that follow each other with the same input (q, k and v): its gradient is summed once for all."""

    def __init__(self) -> None:
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def of(self, x: torch.Tensor, ranks: TensorRanks) -> torch.Tensor:
        """Return `ranks.copy(x)`, the same tensor as for the last call with this x."""
        if self._last is None or self._last[0] is not x or self._last[1].requires_grad != _has_gradient(x):
            self._last = x, ranks.copy(x)
        return self._last[1]


def _has_gradient(x: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None
