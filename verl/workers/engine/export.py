"""Export a sharded model as the tensors of its checkpoint, gathered to all ranks or to rank 0.

The model is a sequence of export units. A unit is gathered at once: one parameter, or several parameters that
transformers converts together. Rows can be encoded (quantized) on the ranks that hold them, before they are gathered.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from verl.utils.quantization_scheme import QuantizationScheme
from verl.utils.tensor_diff import diff_and_update_, diff_and_update_rounded_
from verl.workers.engine.export_rows import LocalRows, RowRange, find_row_ranges, local_rows
from verl.workers.engine.host_memory import to_device
from verl.workers.engine.loading import decoder_layer_names
from verl.workers.engine.lora import merged_view
from verl.workers.engine.tensor_parallel import TensorParallel

# Bytes of all ranks' rows that one collective sends to rank 0, unless a single parameter is larger.
GATHER_BATCH_BYTES = 8 << 20


class ExportUnit(ABC):
    """One or more parameters that are gathered at once.

    Attributes:
        nbytes: bytes of the gathered unit in the dtype of the export, before encoding; equal on all ranks.
    """

    nbytes: int

    @abstractmethod
    def gather(self) -> dict[str, torch.Tensor]:
        """Return the full, contiguous checkpoint tensors on the model's device. Collective."""


class RowShardedParam(ExportUnit):
    """A parameter of which each rank holds whole rows, and whose checkpoint tensors have the rows in this order.

    Attributes:
        name: name of the parameter.
        ranges: the checkpoint tensors that the parameter consists of.
        first: number of the first row that this rank holds.
        sends: True if this rank sends its rows; if several ranks hold the same rows, one of them does.
    """

    def __init__(
        self,
        name: str,
        shard: torch.Tensor,
        held: LocalRows,
        ranges: tuple[RowRange, ...],
        dtype: torch.dtype | None,
        encoder: QuantizationScheme | None,
        encoded: Mapping[str, torch.Tensor] | None = None,
    ):
        self.name, self.ranges, self.first, self.sends = name, ranges, held.first, held.sends
        self._shard, self._dtype, self._encoder, self._encoded = shard, dtype, encoder, encoded
        self._local = _local(shard)
        self.nbytes = _nbytes(shard, dtype)

    @functools.cached_property
    @torch.no_grad()
    def parts(self) -> dict[str, torch.Tensor]:
        """This rank's rows [..., elements per row] in the form in which they are sent, by suffix of the tensor's name.

        They may share memory with the parameter, or with what keeps rows that were encoded before.
        """
        if self._encoded is not None:
            return dict(self._encoded)
        if self._encoder is None:
            return {"": _cast(self._local, self._dtype)}
        return self._encoder.encode_weight(self.ranges[0].name, self._local, self._dtype, report_as=self.name)

    @torch.no_grad()
    def diff_and_update_(self, kept: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Update `kept`, the `parts` of an earlier export, in place to the present `parts`.

        Returns:
            by suffix, the changed indices in the flattened part, int64 ascending.
        """
        if self._encoded is not None:
            return {suffix: diff_and_update_(kept[suffix], part) for suffix, part in self._encoded.items()}
        if self._encoder is None:
            return {"": diff_and_update_rounded_(kept[""], self._local.contiguous())}
        return self._encoder.diff_and_update_(self.ranges[0].name, self._local, kept, self._dtype, report_as=self.name)

    def is_copy(self, part: torch.Tensor) -> bool:
        """Return True if a part has its own memory, which nothing else reads or changes."""
        return self._encoded is None and part.untyped_storage().data_ptr() != self._local.untyped_storage().data_ptr()

    def gather(self) -> dict[str, torch.Tensor]:
        return self.to_checkpoint_tensors(
            {suffix: gather_rows(part, self._shard) for suffix, part in self.parts.items()}
        )

    def sizes(self, part: torch.Tensor) -> list[int] | None:
        """Return the bytes of `part`, one of `parts`, that each rank sends; None if no choice of them is complete.

        If several ranks hold the same rows, only the first copy is sent.
        """
        shard, ranks, order = self._shard, dist.get_world_size(), self.order
        if not isinstance(shard, DTensor) or sorted(order) != list(range(ranks)):
            return None
        *outer, split = shard.placements
        if not split.is_shard(0) or not all(each.is_replicate() or each.is_shard(0) for each in outer):
            return None
        # Rows are divided into slices, each of which is sharded over its ranks; or the first ranks hold the first copy.
        shards = shard.device_mesh.size(shard.device_mesh.ndim - 1)
        slices = ranks // shards if outer and outer[0].is_shard(0) else 1
        length = shard.shape[0] // slices
        share, row = -(-length // shards), part.dtype.itemsize * prod(part.shape[1:])
        rows = [max(0, min(share, length - rank * share)) for rank in range(shards)] * slices
        sizes = dict(zip(order, [count * row for count in rows] + [0] * (ranks - len(rows)), strict=True))
        return [sizes[rank] for rank in range(ranks)]

    @property
    def order(self) -> list[int]:
        """The ranks in the order of the rows that they hold."""
        return self._shard.device_mesh.mesh.flatten().tolist() if isinstance(self._shard, DTensor) else []

    def to_checkpoint_tensors(self, gathered: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the checkpoint tensors as views of the gathered parts of all ranks."""
        found = {}
        for suffix, part in gathered.items():
            flat = part.reshape(-1)
            for target in self.ranges:
                shape, start = target.shape_and_offset(part)
                found[target.name + suffix] = flat[start : start + prod(shape)].view(shape)
        return found


class GatheredParams(ExportUnit):
    """Parameters whose checkpoint tensors can only be made, or encoded, after they are gathered."""

    def __init__(
        self,
        model: PreTrainedModel,
        shards: dict[str, torch.Tensor],
        dtype: torch.dtype | None,
        exceptions: Mapping[str, torch.dtype],
    ):
        self._model, self._shards, self._dtype, self._exceptions = model, shards, dtype, exceptions
        self.nbytes = sum(_nbytes(shard, dtype) for shard in shards.values())

    def gather(self) -> dict[str, torch.Tensor]:
        # Only the conversion shows which tensors a parameter becomes, so with exceptions they are cast after it.
        dtype = None if self._exceptions else self._dtype
        tensors = {name: _gather_full(shard, dtype) for name, shard in self._shards.items()}
        if getattr(self._model, "_weight_conversions", None):
            tensors = revert_weight_conversion(self._model, tensors)
        if self._exceptions:
            tensors = {name: _cast(tensor, self._exceptions.get(name, self._dtype)) for name, tensor in tensors.items()}
        return {name: tensor.contiguous() for name, tensor in tensors.items()}


class WeightExport:
    """A sharded model as the tensors that `save_pretrained` would write.

    Created once per model, to remember how transformers converts the rows. The weights of adapters are merged into
    those of their layers; each rank merges the rows that it holds.

    Args:
        device: device of the exported tensors and of collectives; None for that of the parameters. Parameters that FSDP
            keeps on the host are copied to it, one unit at a time.
        tensor: the layers of the model that are divided among ranks.
    """

    def __init__(
        self, model: PreTrainedModel, device: torch.device | None = None, tensor: TensorParallel | None = None
    ):
        self._model, self._device, self._tensor = model, device, tensor
        self._ranges: dict[tuple[str, ...], dict[str, tuple[RowRange, ...]]] = {}
        self._held: dict[str, LocalRows | None] = {}

    @torch.no_grad()
    def units(
        self,
        *,
        dtype: torch.dtype | None = None,
        exceptions: Mapping[str, torch.dtype] | None = None,
        encoder: QuantizationScheme | None = None,
        encoded: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
        whole_rows: bool = True,
    ) -> Iterator[ExportUnit]:
        """Iterate over all parameters, a tied weight once.

        Collective: every rank must exhaust the iterator, and all ranks must gather the same units.

        Args:
            dtype: dtype of the floating-point tensors, None for each parameter's dtype; shards are cast before they
                are gathered.
            exceptions: other dtypes of single tensors that are not encoded, by checkpoint name.
            encoder: encodes rows before they are gathered, so that the ranks exchange fewer bytes. This needs a
                parameter whose shards are whole rows (FSDP2 shards the first dimension), and whose checkpoint tensors
                consist of whole rows in this order. Other parameters are gathered without encoding.
            encoded: this rank's rows of some parameters, encoded before: parameter -> suffix -> rows.
            whole_rows: exchange parts of rows that ranks divide for whole rows; without it, such a part is a unit,
                whose encoded form may be read but not gathered.
        """
        model, others, done = self._model, exceptions or {}, encoded or {}
        held_parts, adapters, groups = self._shards()
        shards = self._whole(held_parts)

        def merged(name: str, dtype: torch.dtype | None) -> torch.Tensor:
            shard = to_device(shards[name], self._device)
            return adapters[name].to(self._device).merged(shard, dtype) if name in adapters else shard

        for names in groups:
            ranges = self._ranges_of(tuple(names), shards)
            rest = []
            for name in names:
                held = self._held[name] if name in ranges else None
                encodes = None if held is None else _encodes(encoder, ranges[name], shards[name].dim())
                dtypes = {dtype if encodes else others.get(part.name, dtype) for part in ranges.get(name, ())}
                if held is None or encodes is None or len(dtypes) > 1:
                    rest.append(name)
                else:
                    (cast,) = dtypes
                    parts = done.get(name) if encodes else None
                    shard = merged(name, cast) if parts is None else shards[name]
                    if whole_rows and self._tensor is not None and self._tensor.gives_whole_rows(name, shards[name]):
                        shard, parts = _with_whole_rows(self._tensor, shard, parts, cast)
                    yield RowShardedParam(name, shard, held, ranges[name], cast, encoder if encodes else None, parts)
            separate = [[name] for name in rest if name in ranges]
            for together in (*separate, [name for name in rest if name not in ranges]):
                if together:
                    shards_together = {name: merged(name, None if others else dtype) for name in together}
                    yield GatheredParams(model, shards_together, dtype, others)

    @torch.no_grad()
    def row_ranges(self) -> Iterator[tuple[str, torch.Tensor, tuple[RowRange, ...]]]:
        """Iterate over the parameters whose rows can be encoded where they are held: name, parameter, ranges."""
        shards, _, groups = self._shards()
        whole = self._whole(shards)
        for names in groups:
            for name, ranges in self._ranges_of(tuple(names), whole).items():
                if self._held[name] is not None:
                    yield name, shards[name], ranges

    def _shards(self) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[list[str]]]:
        """Return the parameters, the adapters of some of them, and the names that are converted together."""
        model = self._model
        shards, adapters = merged_view(model.state_dict(keep_vars=True), model)
        groups = _groups(model, shards, by_layer=bool(getattr(model, "_weight_conversions", None)))
        return shards, adapters, groups

    def _whole(self, shards: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the undivided parameters of which this rank holds parts."""
        if self._tensor is None:
            return shards
        return {name: self._tensor.whole(name, shard) for name, shard in shards.items()}

    def _ranges_of(self, names: tuple[str, ...], shards: dict[str, torch.Tensor]) -> dict[str, tuple[RowRange, ...]]:
        if names not in self._ranges:
            self._ranges[names] = find_row_ranges(self._model, {name: shards[name].shape for name in names})
            for name in names:
                layout = shard = shards[name]
                if self._tensor is not None and self._tensor.gives_whole_rows(name, shard):
                    layout = self._tensor.whole_rows(shard, _local(shard).to("meta"))
                self._held[name] = local_rows(layout, dist.get_rank())
        return self._ranges[names]


def gather_all(units: Iterable[ExportUnit]) -> Iterator[tuple[str, torch.Tensor]]:
    """Gather one unit after another to all ranks; iterate over names and checkpoint tensors. Collective."""
    for unit in units:
        yield from unit.gather().items()


def gather_to_rank0(units: Iterable[ExportUnit]) -> Iterator[tuple[ExportUnit, dict[str, torch.Tensor]]]:
    """Iterate over the units and the result of their `gather`, which is valid only on rank 0.

    Collective: every rank must exhaust the iterator. Rows are sent only to rank 0, whereas an all-gather would send
    all rows to every rank. Small parameters share a collective: if the ranks share processors, each collective waits
    until all of them were scheduled.
    """
    waiting: list[_Share] = []
    for unit in units:
        shares = _shares(unit)
        if shares is None:
            yield from _gather_shares(waiting)
            waiting = []
            yield unit, unit.gather()
            continue
        waiting += shares
        if sum(sum(share.sizes) for share in waiting) >= GATHER_BATCH_BYTES:
            yield from _gather_shares(waiting)
            waiting = []
    yield from _gather_shares(waiting)


@dataclass(frozen=True)
class _Share:
    """One part of a parameter.

    Attributes:
        part: this rank's rows.
        sizes: bytes of the part that each rank sends: all of its part, or nothing.
    """

    unit: RowShardedParam
    suffix: str
    part: torch.Tensor
    sizes: list[int]


def _shares(unit: ExportUnit) -> list[_Share] | None:
    """Return the parts of a unit, None if its rows cannot be sent to rank 0 only."""
    if not isinstance(unit, RowShardedParam) or dist.get_world_size() == 1:
        return None
    shares = []
    for suffix, part in unit.parts.items():
        sizes = unit.sizes(part)
        if sizes is None:
            return None
        shares.append(_Share(unit, suffix, part, sizes))
    return shares


def _gather_shares(shares: Sequence[_Share]) -> Iterator[tuple[ExportUnit, dict[str, torch.Tensor]]]:
    """Gather parts to rank 0 in one collective, an all_to_all as in `gather_blocks`."""
    if not shares:
        return
    ranks, is_rank0 = dist.get_world_size(), dist.get_rank() == 0
    own = dist.get_rank()
    raw = [share.part.contiguous().view(-1).view(torch.uint8)[: share.sizes[own]] for share in shares]
    sent = raw[0] if len(raw) == 1 else torch.cat(raw)
    rank_bytes = [sum(share.sizes[rank] for share in shares) for rank in range(ranks)]
    received = torch.empty(sum(rank_bytes) if is_rank0 else 0, dtype=torch.uint8, device=sent.device)
    dist.all_to_all_single(
        received,
        sent,
        output_split_sizes=rank_bytes if is_rank0 else [0] * ranks,
        input_split_sizes=[sent.numel(), *[0] * (ranks - 1)],
    )
    gathered: dict[int, tuple[RowShardedParam, dict[str, torch.Tensor]]] = {
        id(share.unit): (share.unit, {}) for share in shares
    }
    if is_rank0:
        blocks_of_ranks = enumerate(received.split(rank_bytes))
        by_rank = [block.split([share.sizes[rank] for share in shares]) for rank, block in blocks_of_ranks]
        for share, blocks in zip(shares, zip(*by_rank, strict=True), strict=True):
            order = share.unit.order
            in_order = len(shares) == 1 and order == sorted(order)
            rows = received if in_order else torch.cat([blocks[rank] for rank in order])
            gathered[id(share.unit)][1][share.suffix] = rows.view(share.part.dtype).view(-1, *share.part.shape[1:])
    for unit, parts in gathered.values():
        yield unit, unit.to_checkpoint_tensors(parts)


def _with_whole_rows(
    tensor: TensorParallel,
    shard: torch.Tensor,
    parts: Mapping[str, torch.Tensor] | None,
    dtype: torch.dtype | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
    """Return a parameter with whole rows, cast before they are exchanged, and its encoded `parts` in their place."""
    if parts is None:
        return tensor.whole_rows(shard, _cast(_local(shard), dtype)), None
    rows = {suffix: tensor.whole_rows(shard, part) for suffix, part in parts.items()}
    # With encoded parts, only the layout of the parameter is read.
    return tensor.whole_rows(shard, _local(shard).to("meta")), {suffix: _local(row) for suffix, row in rows.items()}


def _encodes(encoder: QuantizationScheme | None, ranges: tuple[RowRange, ...], dimensions: int) -> bool | None:
    """Return True if rows are encoded before the gather; None if some tensors can only be encoded after it."""
    if encoder is None:
        return False
    if dimensions > 1 and all(encoder.encodes_rows(part.name) for part in ranges):
        return True
    return None if any(encoder.quantizes(part.name) for part in ranges) else False


def _nbytes(tensor: torch.Tensor, dtype: torch.dtype | None) -> int:
    return tensor.numel() * (dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype).itemsize


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def _gather_full(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Return the full tensor on every rank; the shards are cast before they are gathered."""
    if not isinstance(tensor, DTensor) or tensor.device_mesh.size() == 1:
        return _cast(_local(tensor), dtype)
    shards = _cast(tensor.detach(), dtype)
    assert isinstance(shards, DTensor)
    return shards.full_tensor()


@torch.no_grad()
def _local(tensor: torch.Tensor) -> torch.Tensor:
    # Detaching a DTensor costs far more than detaching its local tensor.
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def gather_rows(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the parts [rows of this rank, ...] of all ranks, sharded like `like`, as one tensor."""
    if not isinstance(like, DTensor) or like.device_mesh.size() == 1:
        return part
    # Collectives do not support float8.
    local = part.view(torch.uint8) if part.dtype.itemsize == 1 else part
    shape = torch.Size([*like.shape[:-1], part.shape[-1]]) if like.dim() > 1 else like.shape
    stride = torch.empty(shape, device="meta").stride()
    sharded = DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)
    return sharded.full_tensor().view(part.dtype)


def _groups(model: PreTrainedModel, state: dict[str, torch.Tensor], by_layer: bool) -> list[list[str]]:
    """Group the state-dict names that have to be converted together; a tied weight occurs once.

    Args:
        by_layer: one group per decoder layer; otherwise one group per parameter.
    """
    first_of: dict[int, str] = {}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    # The name that the checkpoint keeps sorts before its aliases.
    for name in sorted(state, key=lambda name: name in tied):
        first_of.setdefault(id(state[name]), name)
    ignored = set(model._keys_to_ignore_on_save or ())
    kept = set(first_of.values()) - ignored
    layers = decoder_layer_names(model) if by_layer else []
    groups: dict[str, list[str]] = {}
    for name in state:
        if name in kept:
            group = next((layer for layer in layers if name.startswith(f"{layer}.")), name)
            groups.setdefault(group, []).append(name)
    return list(groups.values())
