"""The weights that a trainer rank sent last, and the elements that have changed since.

A full update keeps every byte that it sends. A delta compares the present bytes with the kept ones and updates them.
The kept weights belong to a version only after its `commit`: an update that ends before leaves none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist

from verl.utils.quantization_scheme import QuantizationScheme
from verl.utils.tensor_diff import diff_and_update_
from verl.workers.engine.export import ExportUnit, RowShardedParam, gather_to_rank0
from verl.workers.engine.export_rows import row_length
from verl.workers.weight_sync.block_gather import PackedBlock, gather_blocks
from verl.workers.weight_sync.delta import DeltaBlock
from verl.workers.weight_sync.delta_checks import check_trainer_base

# The changed elements of the ranks are gathered to rank 0 about `_GATHERS` times per update, after the same number of
# bytes of a full update on all ranks: few enough to bound the memory, and a part of the model small enough that the
# engine applies one while the next is compared.
_GATHER_BYTES, _SMALLEST_GATHER = 256 << 20, 16 << 20
_GATHERS = 6


class LastSentWeights:
    """The last sent weights of one rank.

    Args:
        scheme: encodes and checks the weights; None if the engine quantizes.
        keeps: keep the sent weights; without them there are no deltas.
    """

    def __init__(self, scheme: QuantizationScheme | None, *, keeps: bool):
        self._scheme, self._keeps = scheme, keeps
        # Parameter name -> suffix -> tensor; for tensors that rank 0 encodes, checkpoint name -> "" -> tensor.
        self._kept: dict[str, dict[str, torch.Tensor]] = {}
        self._version: int | None = None
        self._full_bytes = 0

    def check_base(self, base: int) -> None:
        """Check that a delta against the version `base` can be built; WeightUpdateError if it cannot."""
        check_trainer_base(self._version, base)

    def commit(self, version: int) -> None:
        """Mark the kept weights as `version`: all of it was sent."""
        if self._keeps:
            self._version = version

    def export_full(self, units: Iterator[ExportUnit]) -> Iterator[tuple[str, torch.Tensor]]:
        """Return a stream of the checkpoint tensors as they are sent; on other ranks than 0 it is empty.

        Collective: every rank must exhaust it.

        Raises:
            WeightUpdateError: on rank 0, for a weight that holds NaN or Inf.
        """
        self._version, self._full_bytes = None, 0
        is_rank0 = dist.get_rank() == 0
        gathered = gather_to_rank0(units)
        try:
            for unit, tensors in gathered:
                self._full_bytes += unit.nbytes
                rows = unit if isinstance(unit, RowShardedParam) else None
                if rows is not None and rows.sends and self._keeps:
                    for suffix, part in rows.parts.items():
                        self._keep(rows.name, suffix, part, is_copy=rows.is_copy(part))
                for name, tensor in self._encode(tensors) if is_rank0 else ():
                    if self._keeps and rows is None:
                        self._keep(name, "", tensor, is_copy=name not in tensors or tensor is not tensors[name])
                    yield name, tensor
        except Exception:
            # The other ranks gather to the end, and would wait there for this one.
            for _ in gathered:
                pass
            raise

    def export_delta(self, units: Iterator[ExportUnit], device: torch.device) -> Iterator[PackedBlock | None]:
        """Return a stream of the blocks of all ranks that changed since the last commit; empty on other ranks than 0.

        None follows the blocks of each gather: they can be sent while the next units are compared. Collective: every
        rank must exhaust the stream.

        Args:
            device: device of the process group's collectives.

        Raises:
            WeightUpdateError: on all ranks, for a changed weight that holds NaN or Inf on any of them.
        """
        self._version = None
        gather_bytes = min(_GATHER_BYTES, max(_SMALLEST_GATHER, self._full_bytes // _GATHERS))
        block, nbytes, error = DeltaBlock(), 0, None
        for unit in units:
            try:
                self._compare(unit, block)
            except Exception as found:  # noqa: BLE001  (raised on all ranks by the next gather)
                error = error or found
            nbytes += unit.nbytes
            if nbytes >= gather_bytes:
                yield from gather_blocks(block, device, error)
                if dist.get_rank() == 0:
                    yield None
                block, nbytes = DeltaBlock(), 0
        yield from gather_blocks(block, device, error)

    def _encode(self, tensors: dict[str, torch.Tensor]) -> Iterable[tuple[str, torch.Tensor]]:
        return tensors.items() if self._scheme is None else self._scheme.encode(tensors.items())

    def _compare(self, unit: ExportUnit, block: DeltaBlock) -> None:
        """Add the changed elements of the rows that this rank sends."""
        if isinstance(unit, RowShardedParam):
            if not unit.sends:
                return
            kept = self._kept[unit.name]
            for suffix, changed in unit.diff_and_update_(kept).items():
                cuts = [(cut.name + suffix, *cut.shape_and_offset(kept[suffix])) for cut in unit.ranges]
                self._add(kept[suffix], changed, unit.first, cuts, block)
            return
        tensors = unit.gather()
        for name, tensor in self._encode(tensors) if dist.get_rank() == 0 else ():
            changed = diff_and_update_(self._kept[name][""], tensor)
            self._add(tensor, changed, 0, [(name, tuple(tensor.shape), 0)], block)

    def _keep(self, name: str, suffix: str, part: torch.Tensor, *, is_copy: bool) -> None:
        """Keep a contiguous copy of a tensor; the tensor itself if nothing else changes it (`is_copy`)."""
        kept = part.contiguous()
        is_copy = is_copy or kept.data_ptr() != part.data_ptr()
        self._kept.setdefault(name, {})[suffix] = kept if is_copy else kept.clone()

    def _add(
        self,
        part: torch.Tensor,
        changed: torch.Tensor,
        first_row: int,
        cuts: Sequence[tuple[str, tuple[int, ...], int]],
        block: DeltaBlock,
    ) -> None:
        """Add the changed elements of some adjacent rows.

        Args:
            part: the present rows.
            changed: int64, ascending: indices of the changed elements in the flattened rows.
            first_row: number of the first of these rows in the parameter.
            cuts: the tensors that the parameter is cut into: name, shape, and index of the first element in the
                flattened parameter.
        """
        if not changed.numel():
            return
        new = part.reshape(-1)
        start = first_row * row_length(part.shape)
        ends = [first - start for _, _, first in cuts[1:]] + [new.numel()]
        bounds = [0, *np.searchsorted(changed.cpu().numpy(), ends)]
        for number, (name, shape, first) in enumerate(cuts):
            indices = changed[bounds[number] : bounds[number + 1]]
            if indices.numel():
                begin = max(first - start, 0)
                rows = new[begin : min(ends[number], new.numel())]
                values = block.add(name, shape, start + begin - first, rows, indices - begin)
                if self._scheme is not None:
                    self._scheme.check_sent(name, values)
