"""What a trainer rank sent last of the rows that it holds, and what has changed in them since.

A whole update keeps every byte that it sends; a delta compares what would be sent now with that, byte for byte, and
keeps it in turn. Kept weights are those of a version only from `commit` on: an update that ends on the way leaves none.
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
from verl.workers.weight_sync.manifest import WeightUpdateError

# After so many bytes of a whole update, the same on all ranks, their changes travel to rank 0: few enough to bound
# memory, and a share of the model small enough that the engine changes one while the next is compared.
_CHUNK_BYTES, _SMALLEST_CHUNK = 256 << 20, 16 << 20
_CHUNKS = 6


class LastSentWeights:
    """One rank's.

    Args:
        scheme: encodes and checks what is sent; None where the engine quantizes.
        keeps: keep what is sent; without, there are no deltas.
    """

    def __init__(self, scheme: QuantizationScheme | None, *, keeps: bool):
        self._scheme, self._keeps = scheme, keeps
        # By name of the parameter, and suffix; or of the checkpoint tensor where that is what rank 0 encodes.
        self._kept: dict[str, dict[str, torch.Tensor]] = {}
        self._version: int | None = None
        self._whole_bytes = 0

    def check_base(self, base: int) -> None:
        """Refuse a delta to anything but the version that is kept."""
        if self._version != base:
            kept = "nothing" if self._version is None else f"version {self._version}"
            raise WeightUpdateError(f"the trainer keeps {kept}, a delta to version {base} was asked for")

    def commit(self, version: int) -> None:
        """All of `version` was sent."""
        if self._keeps:
            self._version = version

    def export_full(self, units: Iterator[ExportUnit]) -> Iterator[tuple[str, torch.Tensor]]:
        """On rank 0 each checkpoint tensor as it is sent; on other ranks nothing. Collective: to be exhausted.

        Raises:
            WeightUpdateError: a weight that holds NaN or Inf, on rank 0.
        """
        self._version, self._whole_bytes = None, 0
        first = dist.get_rank() == 0
        gathered = gather_to_rank0(units)
        try:
            for unit, whole in gathered:
                self._whole_bytes += unit.nbytes
                by_rows = isinstance(unit, RowShardedParam)
                if by_rows and unit.sends and self._keeps:
                    for suffix, part in unit.parts.items():
                        self._keep(unit.name, suffix, part, unit.is_copy(part))
                for name, tensor in self._encoded(whole) if first else ():
                    if self._keeps and not by_rows:
                        self._keep(name, "", tensor, name not in whole or tensor is not whole[name])
                    yield name, tensor
        except Exception:
            # The other ranks gather to the end, and would wait there for this one.
            for _ in gathered:
                pass
            raise

    def export_delta(self, units: Iterator[ExportUnit], device: torch.device) -> Iterator[PackedBlock | None]:
        """On rank 0 what changed on all ranks since the last commit; on other ranks nothing. Collective, as above.

        A None stands between what should travel on and what is only compared now.

        Args:
            device: of the process group's collectives.

        Raises:
            WeightUpdateError: a changed weight that holds NaN or Inf; on all ranks, whichever holds it.
        """
        self._version = None
        chunk = min(_CHUNK_BYTES, max(_SMALLEST_CHUNK, self._whole_bytes // _CHUNKS))
        block, nbytes, error = DeltaBlock(), 0, None
        for unit in units:
            try:
                self._compare(unit, block)
            except Exception as found:  # noqa: BLE001  (raised on all ranks, where none is waited for)
                error = error or found
            nbytes += unit.nbytes
            if nbytes >= chunk:
                yield from gather_blocks(block, device, error)
                if dist.get_rank() == 0:
                    yield None
                block, nbytes = DeltaBlock(), 0
        yield from gather_blocks(block, device, error)

    def _encoded(self, tensors: dict[str, torch.Tensor]) -> Iterable[tuple[str, torch.Tensor]]:
        return tensors.items() if self._scheme is None else self._scheme.encode(tensors.items())

    def _compare(self, unit: ExportUnit, block: DeltaBlock) -> None:
        """Add what changed of what this rank answers for."""
        if isinstance(unit, RowShardedParam):
            if not unit.sends:
                return
            kept = self._kept[unit.name]
            for suffix, changed in unit.diff_and_update_(kept).items():
                cuts = [(cut.name + suffix, *cut.shape_and_offset(kept[suffix])) for cut in unit.ranges]
                self._add(kept[suffix], changed, unit.first, cuts, block)
            return
        whole = unit.gather()
        for name, tensor in self._encoded(whole) if dist.get_rank() == 0 else ():
            changed = diff_and_update_(self._kept[name][""], tensor)
            self._add(tensor, changed, 0, [(name, tuple(tensor.shape), 0)], block)

    def _keep(self, name: str, suffix: str, part: torch.Tensor, own: bool) -> None:
        """Keep a contiguous tensor that nothing else changes; `own`: nothing changes `part`."""
        kept = part.contiguous()
        own = own or kept.data_ptr() != part.data_ptr()
        self._kept.setdefault(name, {})[suffix] = kept if own else kept.clone()

    def _add(
        self,
        part: torch.Tensor,
        changed: torch.Tensor,
        first_row: int,
        cuts: Sequence[tuple[str, tuple[int, ...], int]],
        block: DeltaBlock,
    ) -> None:
        """Add what changed of some adjacent rows.

        Args:
            part: the rows as they are now.
            changed: int64 places in them flattened, ascending.
            first_row: of these rows in the parameter.
            cuts: name, shape and first element in the parameter of each tensor that the parameter is cut into.
        """
        if not changed.numel():
            return
        new = part.reshape(-1)
        start = first_row * row_length(part.shape)
        ends = [first - start for _, _, first in cuts[1:]] + [new.numel()]
        at = [0, *np.searchsorted(changed.cpu().numpy(), ends)]
        for number, (name, shape, first) in enumerate(cuts):
            places = changed[at[number] : at[number + 1]]
            if places.numel():
                begin = max(first - start, 0)
                rows = new[begin : min(ends[number], new.numel())]
                values = block.add(name, shape, start + begin - first, rows, places - begin)
                if self._scheme is not None:
                    self._scheme.check_sent(name, values)
