"""Streams a sharded model's weights under the names and shapes of its checkpoint, and writes them to a directory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from verl.workers.engine.loading import decoder_layer_names

_SHARD_BYTES = 5 * 10**9


@torch.no_grad()
def export_weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """What `save_pretrained` would write, one tensor after the other, whole and contiguous, on the model's device.

    transformers keeps some weights in another form than their checkpoints, packed experts for example. Its own
    conversion is undone for one decoder layer at a time: no more than a layer (one parameter, where nothing is to be
    converted) is gathered at once. Collective: every rank must exhaust the stream.
    """
    converts = bool(getattr(model, "_weight_conversions", None))
    shards = model.state_dict(keep_vars=True)
    for names in _groups(model, shards, by_layer=converts):
        gathered = {name: _whole(shards[name]) for name in names}
        if converts:
            gathered = revert_weight_conversion(model, gathered)
        for name in list(gathered):
            yield name, gathered.pop(name).contiguous()


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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
