"""Sequence parallelism: neighboring ranks share the packed row of a micro-batch, as in DeepSpeed-Ulysses.

    outside attention    rank r holds the positions [r * n, (r + 1) * n) of the row, with all heads
    inside attention     rank r holds all positions, with its share of the heads

An all-to-all exchange turns one into the other, before and after each attention layer. Every other part of the model
processes each token separately. All ranks of a group hold the same samples and compute the same loss from the
log-probabilities of all of them.

Source: Jacobs et al., DeepSpeed Ulysses (arXiv:2309.14509).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from verl.utils.rank_group import RankGroup


class SequenceRanks(RankGroup):
    """The ranks that share the sequences of this rank's micro-batches."""

    def to_heads(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Exchange this rank's positions with all heads for all N positions with this rank's heads. Collective.

        If there are fewer heads of key and value than ranks, several ranks receive the same head.

        Args:
            query, key, value: [1, heads, n, D]; the heads of key and value divide those of query.

        Returns:
            query [1, heads / size, N, D], and the heads of key and value that it attends to, N = n * size.

        Raises:
            ValueError: the ranks do not divide the heads of query.
        """
        if self.size == 1:
            return query, key, value
        heads, kv_heads = query.shape[1], key.shape[1]
        if heads % self.size:
            raise ValueError(
                f"ulysses_sequence_parallel_size={self.size}: must divide the {heads} query heads of each attention "
                "layer; use a smaller value"
            )
        copies = _copies_of_heads(heads // kv_heads, kv_heads, self.size)
        parts = [query, *(x.repeat_interleave(copies, dim=1) for x in (key, value))]
        sent = [x.squeeze(0).unflatten(0, (self.size, -1)).transpose(1, 2) for x in parts]  # [size, n, heads / size, D]
        received = _AllToAll.apply(torch.cat([x.flatten(2) for x in sent], dim=2), self._group).flatten(0, 1)
        split = received.split([x.shape[2] * x.shape[3] for x in sent], dim=1)
        query, key, value = (
            x.unflatten(1, like.shape[2:]).transpose(0, 1).unsqueeze(0) for x, like in zip(split, sent, strict=True)
        )
        return query, key, value

    def to_positions(self, output: torch.Tensor) -> torch.Tensor:
        """Exchange all positions with this rank's heads for this rank's positions with all heads. Collective.

        Args:
            output: [1, N, heads / size, D].

        Returns:
            [1, n, heads, D].
        """
        if self.size == 1:
            return output
        received = _AllToAll.apply(output.squeeze(0).unflatten(0, (self.size, -1)).contiguous(), self._group)
        return received.transpose(0, 1).flatten(1, 2).unsqueeze(0)

    def gather(self, values: Sequence[torch.Tensor], own: slice, total: int) -> list[torch.Tensor]:
        """Return the values of all ranks. Collective, forward and backward.

        The gradient of a rank's values is the mean over the ranks' losses, so that their sum counts each loss once.

        Args:
            values: each [n], of this rank's tokens.
            own: indices of these tokens among all tokens.
            total: number N of all tokens.

        Returns:
            each [N]; without a gradient if the values have none.
        """
        if self.size == 1:
            return list(values)
        gathered = _Gather.apply(torch.stack(list(values)), own, total, self._group)
        return [
            full if part.requires_grad else full.detach() for full, part in zip(gathered.unbind(), values, strict=True)
        ]


def _copies_of_heads(queries_per_head: int, kv_heads: int, size: int) -> int:
    """Return the smallest number of copies of each key-value head with which `size` ranks get equal numbers of them.

    The copies of a head share its query heads evenly, so each rank's query heads find theirs on the same rank.
    """
    return next(
        copies
        for copies in range(1, queries_per_head + 1)
        if queries_per_head % copies == 0 and kv_heads * copies % size == 0
    )


class _AllToAll(torch.autograd.Function):
    """Send x[r] to rank r; element r of the result comes from rank r. The gradient travels the same way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _AllToAll.apply(grads[0].contiguous(), ctx.group), None


class _Gather(torch.autograd.Function):
    """Gather [K, n] values of different n to [K, N] on every rank."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, own: slice, total: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.own, ctx.group = own, group
        # A sum with the zeros of the other ranks is exact, and needs no equal sizes.
        full = values.new_zeros(values.shape[0], total)
        full[:, own] = values
        dist.all_reduce(full, group=group)
        return full

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad[:, ctx.own] / dist.get_world_size(ctx.group), None, None, None
