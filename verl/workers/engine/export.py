"""Streams a sharded model's weights under the names and shapes of its checkpoint, and writes them to a directory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoTokenizer, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from verl.workers.engine.loading import decoder_layer_names
from verl.workers.engine.lora import merged_view

_SHARD_BYTES = 5 * 10**9


class RowEncoder(Protocol):
    """Turns weights into what is sent in their place, on each rank the rows that it holds."""

    def encodes_rows(self, name: str) -> bool:
        """Whether a checkpoint tensor may be encoded some rows at a time."""

    def encode_weight(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """What rows [..., K] become, by suffix of the name: tensors of the same leading shape."""


@torch.no_grad()
def export_weights(
    model: PreTrainedModel, *, dtype: torch.dtype | None = None, encoder: RowEncoder | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """What `save_pretrained` would write, one tensor after the other, whole and contiguous, on the model's device.

    transformers keeps some weights in another form than their checkpoints, packed experts for example. Its own
    conversion is undone for one decoder layer at a time: no more than a layer (one parameter, where nothing is to be
    converted) is gathered at once. Adapters are added to their layers' weights, each rank to the rows that it holds.
    Collective: every rank must exhaust the stream.

    Args:
        dtype: of the floating tensors, None for each parameter's own; shards are cast before they are gathered.
        encoder: encodes what it can before it is gathered, so that fewer bytes travel between the ranks: a parameter
            whose shards are whole rows (FSDP2 cuts along the first dimension) and that becomes checkpoint tensors
            without its rows being cut, mixed or turned. Others are gathered and come as they are.
    """
    converts = bool(getattr(model, "_weight_conversions", None))
    shards, adapters = merged_view(model.state_dict(keep_vars=True), model)
    for names in _groups(model, shards, by_layer=converts):
        # By suffix of the name; None for what is not encoded.
        gathered: dict[str | None, dict[str, torch.Tensor]] = {}
        for name in names:
            shard = shards[name] if name not in adapters else adapters[name].merged(shards[name], dtype)
            if encoder is not None and _encodable(model, name, shard, encoder, converts):
                for suffix, part in encoder.encode_weight(name, _local(shard, dtype)).items():
                    gathered.setdefault(suffix, {})[name] = _gather_rows(part, shard)
            else:
                gathered.setdefault(None, {})[name] = _whole(shard, dtype)
        if converts:
            gathered = {suffix: revert_weight_conversion(model, tensors) for suffix, tensors in gathered.items()}
            for suffix in gathered.keys() - {None, ""}:
                # The conversion drops dimensions of size 1, such as that of a row's only scale.
                for name, part in gathered[suffix].items():
                    gathered[suffix][name] = part.reshape(*gathered[""][name].shape[:-1], -1)
        for name in [name for tensors in gathered.values() for name in tensors]:
            for suffix, tensors in gathered.items():
                if name in tensors:
                    yield name + (suffix or ""), tensors.pop(name).contiguous()


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def _whole(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if not isinstance(tensor, DTensor) or tensor.device_mesh.size() == 1:
        return _local(tensor, dtype)
    return _cast(tensor, dtype).full_tensor()


def _local(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    tensor = tensor.detach()
    return _cast(tensor.to_local() if isinstance(tensor, DTensor) else tensor, dtype)


def _gather_rows(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """All ranks' parts [rows of this rank, ...], cut as `like` is, as one tensor."""
    if not isinstance(like, DTensor) or like.device_mesh.size() == 1:
        return part
    # Collectives do not know float8.
    plain = part.view(torch.uint8) if part.dtype.itemsize == 1 else part
    shape = torch.Size([*like.shape[:-1], part.shape[-1]])
    stride = torch.empty(shape, device="meta").stride()
    sharded = DTensor.from_local(plain, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)
    return sharded.full_tensor().view(part.dtype)


def _encodable(model: PreTrainedModel, name: str, tensor: torch.Tensor, encoder: RowEncoder, converts: bool) -> bool:
    if tensor.dim() < 2 or not all(
        placement.is_replicate() or (type(placement) is Shard and placement.dim < tensor.dim() - 1)
        for placement in getattr(tensor, "placements", ())
    ):
        return False
    if not converts:
        return encoder.encodes_rows(name)
    # Every row counts up, in no memory but the first row's: shapes alone would not tell a square one that is turned.
    row = torch.arange(tensor.shape[-1], dtype=torch.int32)
    converted = revert_weight_conversion(model, {name: row.expand(tensor.shape)})
    return all(encoder.encodes_rows(target) and _is_row(whole, row) for target, whole in converted.items())


def _is_row(probe: torch.Tensor, row: torch.Tensor) -> bool:
    rows = probe.flatten(0, -2)
    return torch.equal(rows[0], row) and torch.equal(rows[-1], row)


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
