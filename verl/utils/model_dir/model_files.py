"""Reads what a model directory says about itself: config.json, and the headers of its weights. No tensor is loaded."""

from __future__ import annotations

import json
import math
import os
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl.utils.model_dir.hub import download_hint
from verl.utils.model_dir.index import has_weights
from verl.utils.model_dir.shapes_from_config import index_of_config

# Bits of an element, by the safetensors format's dtype names.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_BIN = ("pytorch_model.bin.index.json", "pytorch_model.bin")
_MAX_HEADER = 100_000_000


class ModelFilesError(ValueError):
    """A model directory that cannot be loaded; names the file."""


@dataclass(frozen=True)
class ModelFiles:
    """What a model directory says about itself; None where it does not.

    Attributes:
        config: config.json; of a multi-modal model the text part.
        parameters: elements of all weights.
        nbytes: bytes of all weights in the files.
        tensors: how many.
        shapes: by name; empty where the files do not tell.
    """

    path: Path
    config: dict[str, Any]
    parameters: int | None
    nbytes: int | None
    tensors: int | None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def number(self, *names: str) -> int | None:
        """The first of these fields of config.json that is a number."""
        return next((self.config[name] for name in names if isinstance(self.config.get(name), int)), None)

    @property
    def heads(self) -> int | None:
        return self.number("num_attention_heads", "n_head")

    @property
    def kv_heads(self) -> int | None:
        return self.number("num_key_value_heads") or self.heads

    @property
    def layers(self) -> int | None:
        return self.number("num_hidden_layers", "n_layer")

    @property
    def hidden(self) -> int | None:
        return self.number("hidden_size", "n_embd")

    @property
    def head_dim(self) -> int | None:
        given = self.number("head_dim")
        if given is None and self.hidden and self.heads:
            return self.hidden // self.heads
        return given


def read_model(path: str | Path) -> ModelFiles:
    """Read a model directory.

    Raises:
        ModelFilesError: no such directory, no or a damaged config.json, no weights, or a damaged or truncated file.
    """
    path = Path(path)
    if not path.is_dir():
        problem = "is a file" if path.exists() else "does not exist"
        raise ModelFilesError(
            f"{problem}; give the directory of a Hugging Face model (`hf download NAME --local-dir DIR`)"
            + download_hint(str(path))
        )
    config = _read_json(path / "config.json", "the directory of a Hugging Face model has one")
    text = config.get("text_config")
    weights = _weights(path)
    parameters, nbytes, tensors = _sum(weights) if weights is not None else (None, None, None)
    shapes = {name: tuple(tensor["shape"]) for name, tensor in (weights or {}).items()}
    return ModelFiles(path, text if isinstance(text, dict) else config, parameters, nbytes, tensors, shapes)


def is_config_alone(path: str | Path) -> bool:
    """Whether a directory has a config.json and no weights, which is enough to plan with."""
    return (Path(path) / "config.json").is_file() and not has_weights(Path(path))


def read_config_alone(path: str | Path) -> ModelFiles:
    """As `read_model`, of a directory without weights; ModelFilesError for a damaged config.json."""
    return model_of_config(path, _read_json(Path(path) / "config.json", ""))


def model_of_config(path: str | Path, config: dict[str, Any]) -> ModelFiles:
    """The model that a config.json describes, in BF16; its size is None where its type is not known here."""
    path, text = Path(path), config.get("text_config")
    inner = text if isinstance(text, dict) else config
    try:
        tensors = index_of_config(path, config).tensors
    except ValueError:
        return ModelFiles(path, inner, None, None, None)
    shapes = {name: info.shape for name, info in tensors.items()}
    nbytes = sum(info.nbytes for info in tensors.values())
    return ModelFiles(path, inner, sum(map(math.prod, shapes.values())), nbytes, len(shapes), shapes)


def _weights(path: Path) -> dict[str, Any] | None:
    if (path / _INDEX).is_file():
        return _sharded(path)
    if (path / _WHOLE).is_file():
        return read_header(path / _WHOLE)
    for name in _BIN:
        if (path / name).is_file():
            _check_bin(path, name)
            return None
    present = sorted(entry.name for entry in path.iterdir())[:8]
    raise ModelFilesError(
        f"has no weights: no {_WHOLE}, {_INDEX} or {_BIN[1]} (it has {', '.join(present)}); copy them there"
    )


def _sharded(path: Path) -> dict[str, Any]:
    weight_map = _read_json(path / _INDEX, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFilesError(f"{_INDEX} has no weight_map; copy it again")
    whole: dict[str, Any] = {}
    for name in sorted(set(weight_map.values())):
        if not (path / name).is_file():
            raise ModelFilesError(f"{name} is missing, which {_INDEX} lists; copy it there")
        header = read_header(path / name)
        absent = [tensor for tensor, file in weight_map.items() if file == name and tensor not in header]
        if absent:
            raise ModelFilesError(f"{name} lacks {absent[0]}, which {_INDEX} says is there; copy both again")
        whole |= header
    return whole


def read_header(path: Path) -> dict[str, Any]:
    """Tensor name -> {dtype, shape, data_offsets} of a safetensors file, checked against the file's size.

    Raises:
        ModelFilesError: the file is damaged or truncated.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _damaged(path, f"it has {size} bytes, too few for a header")
        length = struct.unpack("<Q", prefix)[0]
        if length > min(_MAX_HEADER, size - 8):
            raise _damaged(path, f"its header should have {length} bytes, but the file has {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except ValueError:
        raise _damaged(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a table")
    header.pop("__metadata__", None)
    end = 0
    for name, tensor in header.items():
        end = max(end, _tensor_end(path, name, tensor))
    if end != size - 8 - length:
        what = "truncated" if end > size - 8 - length else "longer than its header says"
        raise _damaged(path, f"{what}: {size} bytes, where {end + 8 + length} should be")
    return header


def _tensor_end(path: Path, name: str, tensor: Any) -> int:
    try:
        start, end = tensor["data_offsets"]
        bits = _BITS[tensor["dtype"]] * math.prod(tensor["shape"])
    except (KeyError, TypeError, ValueError):
        raise _damaged(path, f"its header does not describe {name}") from None
    if not 0 <= start <= end or end - start != -(-bits // 8):
        raise _damaged(path, f"its header contradicts itself about {name}")
    return end


def _sum(header: dict[str, Any]) -> tuple[int, int, int]:
    parameters = sum(math.prod(tensor["shape"]) for tensor in header.values())
    nbytes = sum(tensor["data_offsets"][1] - tensor["data_offsets"][0] for tensor in header.values())
    return parameters, nbytes, len(header)


def _check_bin(path: Path, name: str) -> None:
    names = [name]
    if name.endswith(".json"):
        names = sorted(set((_read_json(path / name, "").get("weight_map") or {}).values()))
    for file in names:
        if not (path / file).is_file():
            raise ModelFilesError(f"{file} is missing, which {name} lists; copy it there")
        if os.path.getsize(path / file) == 0 or not zipfile.is_zipfile(path / file):
            raise ModelFilesError(f"{file} is damaged or truncated: it is no whole PyTorch file; copy it again")


def _read_json(path: Path, why: str) -> dict[str, Any]:
    if not path.is_file():
        raise ModelFilesError(f"has no {path.name}: {why}; copy it there")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFilesError(f"{path.name} is damaged ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise ModelFilesError(f"{path.name} does not hold an object; copy it again")
    return value


def _damaged(path: Path, what: str) -> ModelFilesError:
    return ModelFilesError(f"{path.name} is damaged: {what}; copy or download it again")
