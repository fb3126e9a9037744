"""Config of a checkpoint, and names, shapes and dtypes of its tensors. No weight is read.

Formats: safetensors (one file, or shards with an index), of which only headers are read, and PyTorch's zip format
(`pytorch_model.bin`, or shards with an index), which is mapped into memory and unpickled onto the meta device.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.utils.model_dir.config_fields import config_problem
from verl.utils.model_dir.errors import ModelFilesError
from verl.utils.model_dir.safetensors_header import TensorInfo, read_safetensors_header
from verl.utils.text import without_repeated_keys

SAFETENSORS_FILE, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_FILE, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# torch dtype name -> name in the safetensors format.
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


_COPY = "correct the file, or copy it again"


@dataclass(frozen=True)
class CheckpointIndex:
    """Config and tensors of a model directory.

    Attributes:
        model_dir: the directory.
        config: its `config.json`.
        tensors: every stored tensor by name, in file order.
    """

    model_dir: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The part of the config for the language model; the whole config of a text-only model."""
        config = self.config
        for key in ("thinker_config", "text_config", "llm_config"):
            inner = config.get(key)
            if isinstance(inner, Mapping):
                config = inner
        return config


def read_checkpoint_index(model_dir: str | Path) -> CheckpointIndex:
    """Read a model directory's config and the names, shapes and dtypes of its weights.

    Raises:
        ValueError: the directory, config.json or the checkpoint does not exist, or a file is damaged or missing.
    """
    directory = Path(model_dir)
    if not directory.is_dir():
        raise ValueError(f"model directory {str(model_dir)!r} does not exist; give a local Hugging Face directory")
    config = read_model_config(directory)
    tensors: dict[str, TensorInfo] = {}
    for file, names in weight_files(directory).items():
        stored = _read_safetensors_file(file) if file.suffix == ".safetensors" else _read_torch_file(file)
        missing = sorted(names - stored.keys())
        if missing:
            raise ValueError(
                f"{file}: does not hold {missing[0]!r} ({len(missing)} such), but the index lists it "
                f"({SAFETENSORS_INDEX if file.suffix == '.safetensors' else TORCH_INDEX}); copy both again"
            )
        # With an index only the listed tensors count: a shard may hold others, which no loader reads.
        tensors.update((name, info) for name, info in stored.items() if not names or name in names)
    if not tensors:
        raise ValueError(f"{directory}: the checkpoint holds no tensor")
    return CheckpointIndex(directory, config, tensors)


def has_weights(directory: Path) -> bool:
    """Return whether a model directory holds any file of weights, complete or not."""
    return any(directory.glob("*.safetensors*")) or any(directory.glob("pytorch_model*.bin*"))


def read_model_config(directory: Path) -> dict[str, Any]:
    """Read config.json of a model directory; raises as `read_json_object`, and for a field that no model has."""
    config = read_json_object(directory / "config.json")
    if (problem := config_problem(config)) is not None:
        raise ValueError(f"{directory / 'config.json'}: {problem}")
    return config


def read_json_object(path: Path, *, unique_keys: bool = False) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        unique_keys: refuse a key that stands twice in an object, of which only the last value would count.

    Raises:
        ValueError: the file is missing, is not JSON, or holds no object; the message names the file, line and column.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        value = json.loads(text, object_pairs_hook=without_repeated_keys if unique_keys else None)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise ValueError(f"{path}: is a directory; give a JSON file") from error
    except json.JSONDecodeError as error:
        if not text.strip():
            raise ValueError(f"{path}: the file is empty; {_COPY}") from error
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{path}: damaged JSON at {place}: {error.msg}; {_COPY}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text file (byte {error.start}); save it as UTF-8") from error
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deeply; {_COPY}") from error
    except ValueError as error:  # a key that stands twice, or a number with thousands of digits
        raise ValueError(f"{path}: {error}; {_COPY}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a JSON {type(value).__name__}, expected an object; {_COPY}")
    return value


def weight_files(directory: Path) -> dict[Path, set[str]]:
    """Return the files to read, with the tensors that an index lists in each (empty: all tensors of the file).

    Raises:
        ValueError: the directory holds no checkpoint, or its index is damaged.
    """
    for index, single in ((SAFETENSORS_INDEX, SAFETENSORS_FILE), (TORCH_INDEX, TORCH_FILE)):
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
        f"{directory}: no checkpoint found; expected {SAFETENSORS_INDEX}, {SAFETENSORS_FILE}, {TORCH_INDEX} or "
        f"{TORCH_FILE}"
    )


def _read_safetensors_file(file: Path) -> dict[str, TensorInfo]:
    try:
        return read_safetensors_header(file)
    except FileNotFoundError as error:
        raise ValueError(_missing(file)) from error
    except ModelFilesError as error:
        raise ValueError(f"{file.parent}: {error}") from error


def _read_torch_file(file: Path) -> dict[str, TensorInfo]:
    import pickle

    import torch

    if not file.is_file():
        raise ValueError(_missing(file))
    try:
        # With mmap and the meta device no storage is read; weights_only keeps the pickle harmless.
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
            raise ValueError(f"{file}: {name} has unknown dtype {dtype}")
        tensors[name] = TensorInfo(tuple(tensor.shape), _TORCH_NAMES[dtype])
    return tensors


def _missing(file: Path) -> str:
    return f"{file}: missing, but the index of the checkpoint lists it"
