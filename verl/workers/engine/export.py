"""Streams a sharded model's weights under the names and shapes of its checkpoint, and writes them to a directory."""

from __future__ import annotations

import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from verl.utils.quantization_scheme import QuantizationScheme
from verl.utils.tensor_diff import diff_and_update_rounded_
from verl.workers.engine.export_rows import LocalRows, RowRange, find_row_ranges, local_rows
from verl.workers.engine.loading import decoder_layer_names
from verl.workers.engine.lora import merged_view

_SHARD_BYTES = 5 * 10**9
# Rows of all ranks that travel to rank 0 in one collective, if no parameter is larger.
TOGETHER_BYTES = 8 << 20


class ExportUnit(ABC):
    """What is gathered at once: a parameter, or several that have to be converted together.

    Attributes:
        nbytes: bytes that it takes in the dtype it is sent in, before it is encoded; the same on all ranks.
    """

    nbytes: int

    @abstractmethod
    def gather(self) -> dict[str, torch.Tensor]:
        """Its checkpoint tensors, whole and contiguous, on the model's device. Collective."""


class RowShardedParam(ExportUnit):
    """A parameter of which each rank holds whole rows, and that a checkpoint holds with its rows in this order.

    Attributes:
        name: of the parameter.
        ranges: the checkpoint tensors that it is cut into.
        first: number of the first row that this rank holds.
        sends: this rank answers for them: of those that hold the same rows one does.
    """

    def __init__(
        self,
        name: str,
        shard: torch.Tensor,
        held: LocalRows,
        ranges: tuple[RowRange, ...],
        dtype: torch.dtype | None,
        encoder: QuantizationScheme | None,
    ):
        self.name, self.ranges, self.first, self.sends = name, ranges, held.first, held.sends
        self._shard, self._dtype, self._encoder = shard, dtype, encoder
        self._local = _local(shard)
        self.nbytes = _nbytes(shard, dtype)

    @functools.cached_property
    @torch.no_grad()
    def parts(self) -> dict[str, torch.Tensor]:
        """By what is added to a tensor's name: the rows of this rank as they are sent, [..., elements of a row].

        They may share the parameter's memory.
        """
        if self._encoder is None:
            return {"": _cast(self._local, self._dtype)}
        return self._encoder.encode_weight(self.name, self._local, self._dtype)

    @torch.no_grad()
    def diff_and_update_(self, kept: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Bring what `parts` held in an earlier update up to date.

        Returns:
            By suffix, the places that changed in the flattened part, int64 ascending.
        """
        if self._encoder is None:
            return {"": diff_and_update_rounded_(kept[""], self._local.contiguous())}
        return self._encoder.diff_and_update_(self.name, self._local, kept, self._dtype)

    def is_copy(self, part: torch.Tensor) -> bool:
        """Whether a part will stay as it is when the parameter changes."""
        return part.untyped_storage().data_ptr() != self._local.untyped_storage().data_ptr()

    def gather(self) -> dict[str, torch.Tensor]:
        return self.to_checkpoint_tensors(
            {suffix: _gather_rows(part, self._shard) for suffix, part in self.parts.items()}
        )

    def sizes(self, part: torch.Tensor) -> list[int] | None:
        """Bytes that each rank holds of one of `parts`; None where not every rank holds a share of its own."""
        shard, ranks = self._shard, dist.get_world_size()
        if not isinstance(shard, DTensor) or tuple(shard.device_mesh.shape) != (ranks,):
            return None
        if not shard.placements[0].is_shard(0):
            return None
        share, row = -(-shard.shape[0] // ranks), part.dtype.itemsize * prod(part.shape[1:])
        return [max(0, min(share, shard.shape[0] - rank * share)) * row for rank in range(ranks)]

    def to_checkpoint_tensors(self, wholes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Checkpoint tensors out of all ranks' parts."""
        found = {}
        for suffix, whole in wholes.items():
            flat = whole.reshape(-1)
            for cut in self.ranges:
                shape, start = cut.shape_and_offset(whole)
                found[cut.name + suffix] = flat[start : start + prod(shape)].view(shape)
        return found


class GatheredParams(ExportUnit):
    """Parameters of which checkpoint tensors can only be made, or encoded, once they are gathered."""

    def __init__(self, model: PreTrainedModel, shards: dict[str, torch.Tensor], dtype: torch.dtype | None):
        self._model, self._shards, self._dtype = model, shards, dtype
        self.nbytes = sum(_nbytes(shard, dtype) for shard in shards.values())

    def gather(self) -> dict[str, torch.Tensor]:
        whole = {name: _whole(shard, self._dtype) for name, shard in self._shards.items()}
        if getattr(self._model, "_weight_conversions", None):
            whole = revert_weight_conversion(self._model, whole)
        return {name: tensor.contiguous() for name, tensor in whole.items()}


class WeightExport:
    """A sharded model as what `save_pretrained` would write of it; made once, to remember how its rows are converted.

    Adapters are added to their layers' weights, each rank to the rows that it holds.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._ranges: dict[tuple[str, ...], dict[str, tuple[RowRange, ...]]] = {}
        self._held: dict[str, LocalRows | None] = {}

    @torch.no_grad()
    def units(
        self, *, dtype: torch.dtype | None = None, encoder: QuantizationScheme | None = None
    ) -> Iterator[ExportUnit]:
        """All of it, a tied weight once. Collective: every rank must exhaust it, and where one gathers all must.

        Args:
            dtype: of the floating tensors, None for each parameter's own; shards are cast before they are gathered.
            encoder: encodes what it can before it is gathered, so that fewer bytes travel between the ranks: a
                parameter whose shards are whole rows (FSDP2 cuts along the first dimension) and that becomes checkpoint
                tensors without its rows being cut, mixed or turned. Others are gathered and come as they are.
        """
        model = self._model
        shards, adapters = merged_view(model.state_dict(keep_vars=True), model)

        def merged(name: str) -> torch.Tensor:
            return adapters[name].merged(shards[name], dtype) if name in adapters else shards[name]

        for names in _groups(model, shards, by_layer=bool(getattr(model, "_weight_conversions", None))):
            ranges = self._ranges_of(tuple(names), shards)
            rest = []
            for name in names:
                held = self._held[name] if name in ranges else None
                encodes = None if held is None else _encodes(encoder, ranges[name], shards[name].dim())
                if held is None or encodes is None:
                    rest.append(name)
                else:
                    yield RowShardedParam(name, merged(name), held, ranges[name], dtype, encoder if encodes else None)
            mapped = [[name] for name in rest if name in ranges]
            for together in (*mapped, [name for name in rest if name not in ranges]):
                if together:
                    yield GatheredParams(model, {name: merged(name) for name in together}, dtype)

    def _ranges_of(self, names: tuple[str, ...], shards: dict[str, torch.Tensor]) -> dict[str, tuple[RowRange, ...]]:
        if names not in self._ranges:
            self._ranges[names] = find_row_ranges(self._model, {name: shards[name].shape for name in names})
            self._held |= {name: local_rows(shards[name], dist.get_rank()) for name in names}
        return self._ranges[names]


def export_weights(
    model: PreTrainedModel, *, dtype: torch.dtype | None = None, encoder: QuantizationScheme | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """What `save_pretrained` would write, one tensor after the other, whole and contiguous, on the model's device.

    No more is gathered at once than a parameter, or the parameters of a decoder layer that are converted together.
    Arguments as of `WeightExport.units`. Collective: every rank must exhaust the stream.
    """
    return gather_all(WeightExport(model).units(dtype=dtype, encoder=encoder))


def gather_all(units: Iterable[ExportUnit]) -> Iterator[tuple[str, torch.Tensor]]:
    for unit in units:
        yield from unit.gather().items()


def _encodes(encoder: QuantizationScheme | None, ranges: tuple[RowRange, ...], dimensions: int) -> bool | None:
    """Whether rows are encoded where they are; None where some of the tensors can only be encoded whole."""
    if encoder is None:
        return False
    if dimensions > 1 and all(encoder.encodes_rows(part.name) for part in ranges):
        return True
    return None if any(encoder.quantizes(part.name) for part in ranges) else False


def _nbytes(tensor: torch.Tensor, dtype: torch.dtype | None) -> int:
    return tensor.numel() * (dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype).itemsize


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def _whole(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if not isinstance(tensor, DTensor) or tensor.device_mesh.size() == 1:
        return _cast(_local(tensor), dtype)
    return _cast(tensor.detach(), dtype).full_tensor()


@torch.no_grad()
def _local(tensor: torch.Tensor) -> torch.Tensor:
    # A DTensor costs a lot more to detach than what it consists of.
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _gather_rows(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """All ranks' parts [rows of this rank, ...], cut as `like` is, as one tensor."""
    if not isinstance(like, DTensor) or like.device_mesh.size() == 1:
        return part
    # Collectives do not know float8.
    plain = part.view(torch.uint8) if part.dtype.itemsize == 1 else part
    shape = torch.Size([*like.shape[:-1], part.shape[-1]]) if like.dim() > 1 else like.shape
    stride = torch.empty(shape, device="meta").stride()
    sharded = DTensor.from_local(plain, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)
    return sharded.full_tensor().view(part.dtype)


def gather_to_rank0(units: Iterable[ExportUnit]) -> Iterator[tuple[ExportUnit, dict[str, torch.Tensor]]]:
    """Each unit with what `gather` makes of it, on rank 0; what other ranks get is not for use.

    Collective: to be exhausted. Rows travel to rank 0 alone, where an all-gather would bring every rank all of them,
    and those of small parameters together: a collective whose ranks share processors waits for each of them.
    """
    waiting: list[tuple[RowShardedParam, str, torch.Tensor, list[int]]] = []
    for unit in units:
        alone = not isinstance(unit, RowShardedParam) or dist.get_world_size() == 1
        shares = [] if alone else [(unit, *item, unit.sizes(item[1])) for item in unit.parts.items()]
        if alone or any(sizes is None for *_, sizes in shares):
            yield from _to_first(waiting)
            waiting = []
            yield unit, unit.gather()
            continue
        waiting += shares
        if sum(sum(sizes) for *_, sizes in waiting) >= TOGETHER_BYTES:
            yield from _to_first(waiting)
            waiting = []
    yield from _to_first(waiting)


def _to_first(
    shares: Sequence[tuple[RowShardedParam, str, torch.Tensor, list[int]]],
) -> Iterator[tuple[ExportUnit, dict[str, torch.Tensor]]]:
    """One collective for some parts: unit, suffix, rows of this rank, and bytes of each rank's.

    By all_to_all, as in `gather_blocks`.
    """
    if not shares:
        return
    ranks, first = dist.get_world_size(), dist.get_rank() == 0
    raw = [part.contiguous().view(-1).view(torch.uint8) for _, _, part, _ in shares]
    sent = raw[0] if len(raw) == 1 else torch.cat(raw)
    of_ranks = [sum(sizes[rank] for *_, sizes in shares) for rank in range(ranks)]
    arrived = torch.empty(sum(of_ranks) if first else 0, dtype=torch.uint8, device=sent.device)
    coming, going = of_ranks if first else [0] * ranks, [sent.numel(), *[0] * (ranks - 1)]
    dist.all_to_all_single(arrived, sent, output_split_sizes=coming, input_split_sizes=going)
    wholes: dict[int, tuple[RowShardedParam, dict[str, torch.Tensor]]] = {id(unit): (unit, {}) for unit, *_ in shares}
    if first:
        pieces = [
            block.split([sizes[rank] for *_, sizes in shares]) for rank, block in enumerate(arrived.split(of_ranks))
        ]
        for (unit, suffix, part, _), of_part in zip(shares, zip(*pieces, strict=True), strict=True):
            whole = arrived if len(shares) == 1 else torch.cat(of_part)
            wholes[id(unit)][1][suffix] = whole.view(part.dtype).view(-1, *part.shape[1:])
    for unit, whole in wholes.values():
        yield unit, unit.to_checkpoint_tensors(whole)


def _groups(model: PreTrainedModel, state: dict[str, torch.Tensor], by_layer: bool) -> list[list[str]]:
    """State-dict names, tied ones once, those that have to be converted together in one list."""
    first_of: dict[int, str] = {}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    # the name that the checkpoint keeps comes first, its aliases after
    for name in sorted(state, key=lambda name: name in tied):
        first_of.setdefault(id(state[name]), name)
    ignored = set(model._keys_to_ignore_on_save or ())
    kept = set(first_of.values()) - ignored
    layers = decoder_layer_names(model) if by_layer else []
    groups: dict[str, list[str]] = {}
    for name in state:
        if name in kept:
            unit = next((layer for layer in layers if name.startswith(f"{layer}.")), name)
            groups.setdefault(unit, []).append(name)
    return list(groups.values())


def write_hf_directory(
    model: PreTrainedModel, path: Path, *, tokenizer_path: str, trust_remote_code: bool, writes: bool
) -> None:
    """Write config, generation config, tokenizer and safetensors; collective, only the rank with `writes` does."""
    weights = _WeightFiles(path) if writes else None
    for name, tensor in export_weights(model):
        if weights is not None:
            weights.add(name, tensor.cpu())
    if weights is None:
        return
    weights.close()
    model.config.save_pretrained(path)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(path)
    AutoTokenizer.from_pretrained(tokenizer_path, trust_remote_code=trust_remote_code).save_pretrained(path)
    source = Path(tokenizer_path)
    if trust_remote_code and source.is_dir():
        for code in source.glob("*.py"):
            (path / code.name).write_bytes(code.read_bytes())


class _WeightFiles:
    """Safetensors files of at most 5 GB and, if there is more than one, their index; one file in memory at a time."""

    def __init__(self, path: Path):
        path.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._tensors: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self._files: list[list[str]] = []
        self._total = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._tensors and self._bytes + size > _SHARD_BYTES:
            self._flush()
        self._tensors[name] = tensor
        self._bytes += size
        self._total += size

    def _part(self, number: int) -> Path:
        return self._path / f"part-{number}.safetensors"

    def _flush(self) -> None:
        save_file(self._tensors, self._part(len(self._files)), metadata={"format": "pt"})
        self._files.append(list(self._tensors))
        self._tensors, self._bytes = {}, 0

    def close(self) -> None:
        """Write what is left and give the files their final names, which hold their count."""
        self._flush()
        count = len(self._files)
        if count == 1:
            self._part(0).rename(self._path / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self._files):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self._path / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        (self._path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
