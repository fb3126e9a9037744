"""Names, shapes and dtypes of a checkpoint's tensors, and its config, without reading a weight.

Formats: safetensors (one file, or shards with an index), whose headers hold everything, and PyTorch's zip format
(`pytorch_model.bin`, or shards with an index), which is mapped into memory and unpickled onto the meta device.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAFETENSORS_INDEX = "model.safetensors.index.json"
TORCH_INDEX = "pytorch_model.bin.index.json"
_HEADER_LIMIT = 100_000_000  # the safetensors library's own limit, in bytes
_BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "U8": 8,
    "BOOL": 8,
    "C64": 64,
}
_TORCH_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and dtype (safetensors' name, such as `BF16`) of a stored tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes in its file."""
        return math.prod(self.shape) * _BITS[self.dtype] // 8


@dataclass(frozen=True)
class CheckpointIndex:
    """What a model directory holds.

    Attributes:
        model_dir: the directory.
        config: its `config.json`.
        tensors: every stored tensor by name, in the order of the files.
    """

    model_dir: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The part of the config that describes the language model; the whole of it for a text-only model."""
        config = self.config
        for key in ("thinker_config", "text_config", "llm_config"):
            inner = config.get(key)
            if isinstance(inner, Mapping):
                config = inner
        return config


def read_checkpoint_index(model_dir: str | Path) -> CheckpointIndex:
    """Read a model directory's config and the names, shapes and dtypes of its weights.

    Raises:
        ValueError: there is no such directory, config or checkpoint, or a file of it is damaged, cut short or missing.
    """
    directory = Path(model_dir)
    if not directory.is_dir():
        raise ValueError(f"model directory {str(model_dir)!r}: no such directory; give a local Hugging Face directory")
    config = read_json_object(directory / "config.json")
    tensors: dict[str, TensorInfo] = {}
    for file, names in _weight_files(directory).items():
        stored = _read_safetensors_header(file) if file.suffix == ".safetensors" else _read_torch_file(file)
        missing = sorted(names - stored.keys())
        if missing:
            raise ValueError(
                f"{file}: does not hold {missing[0]!r} ({len(missing)} such), which its index says it does"
            )
        # An index names what counts: a shard may hold leftovers that no loader reads.
        tensors.update((name, info) for name, info in stored.items() if not names or name in names)
    if not tensors:
        raise ValueError(f"{directory}: its checkpoint holds no tensor")
    return CheckpointIndex(directory, config, tensors)


def has_weights(directory: Path) -> bool:
    """Whether a model directory holds any file of weights, whole or not."""
    return any(directory.glob("*.safetensors*")) or any(directory.glob("pytorch_model*.bin*"))


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        ValueError: no such file, not JSON, or not an object; names the file, and the line and column of a fault.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: damaged JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text file (byte {error.start})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


def _weight_files(directory: Path) -> dict[Path, set[str]]:
    """Files to read, with the names that an index promises in them (none: whatever the file holds)."""
    for index, single in ((SAFETENSORS_INDEX, "model.safetensors"), (TORCH_INDEX, "pytorch_model.bin")):
        if (directory / index).is_file():
            weight_map = read_json_object(directory / index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise ValueError(f"{directory / index}: has no 'weight_map' from tensor names to file names")
            files: dict[str, set[str]] = {}
            for name, file in weight_map.items():
                files.setdefault(file, set()).add(name)
            return {directory / file: names for file, names in files.items()}
        if (directory / single).is_file():
            return {directory / single: set()}
    others = sorted(directory.glob("*.safetensors"))
    if len(others) == 1:
        return {others[0]: set()}
    raise ValueError(
        f"{directory}: no checkpoint found; expected {SAFETENSORS_INDEX}, model.safetensors, {TORCH_INDEX} or "
        f"pytorch_model.bin"
    )


def _read_safetensors_header(file: Path) -> dict[str, TensorInfo]:
    """Header layout: 8 bytes little-endian length, then JSON (safetensors format description)."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _HEADER_LIMIT + 1
            raw = stream.read(length) if length <= _HEADER_LIMIT else b""
    except FileNotFoundError as error:
        raise ValueError(f"{file}: missing, though the checkpoint's index names it") from error
    if length > _HEADER_LIMIT or len(raw) < length:
        raise ValueError(f"{file}: not a safetensors file, or cut short in its header ({size} bytes)")
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors, end = {}, 0
        for name, entry in header.items():
            tensors[name] = TensorInfo(tuple(entry["shape"]), entry["dtype"])
            if entry["dtype"] not in _BITS:
                raise ValueError(f"{file}: {name} has dtype {entry['dtype']!r}, which is not known")
            end = max(end, entry["data_offsets"][1])
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{file}: damaged safetensors header ({error})") from error
    if size < 8 + length + end:
        raise ValueError(f"{file}: cut short: {size} bytes, its header promises {8 + length + end}")
    return tensors


def _read_torch_file(file: Path) -> dict[str, TensorInfo]:
    import pickle

    import torch

    if not file.is_file():
        raise ValueError(f"{file}: missing, though the checkpoint's index names it")
    try:
        # Mapped and sent to the meta device, no storage is touched; weights_only keeps the pickle harmless.
        state = torch.load(file, map_location="meta", mmap=True, weights_only=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{file}: cannot be read as a PyTorch state dict in the zip format: {str(error).splitlines()[0]}; convert "
            "the checkpoint to safetensors"
        ) from error
    tensors = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _TORCH_NAMES:
            raise ValueError(f"{file}: {name} has dtype {dtype}, which is not known")
        tensors[name] = TensorInfo(tuple(tensor.shape), _TORCH_NAMES[dtype])
    return tensors
