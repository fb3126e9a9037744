"""Sizes of a model: its config.json and the sums over the headers of its weights. No tensor is loaded."""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from verl.utils.model_dir.config_fields import config_problem
from verl.utils.model_dir.errors import ModelFilesError
from verl.utils.model_dir.hub import download_hint
from verl.utils.model_dir.index import SAFETENSORS_FILE, SAFETENSORS_INDEX, TORCH_FILE, TORCH_INDEX, has_weights
from verl.utils.model_dir.safetensors_header import TensorInfo, read_safetensors_header
from verl.utils.model_dir.shapes_from_config import index_of_config
from verl.utils.model_dir.weight_shapes import contradiction


@dataclass(frozen=True)
class ModelFiles:
    """Config and sizes of a model directory; a size is None if the files do not show it.

    Attributes:
        whole_config: config.json.
        config: the same; its text part for a multi-modal model. Fields can be overridden.
        parameters: elements of all weights.
        nbytes: bytes of all weights in the files.
        tensors: number of tensors.
        shapes: shapes by tensor name; empty if the files do not show them.
    """

    path: Path
    whole_config: dict[str, Any]
    config: dict[str, Any]
    parameters: int | None
    nbytes: int | None
    tensors: int | None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def number(self, *names: str) -> int | None:
        """Return the first of these fields of config.json that is an integer."""
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
        ModelFilesError: the directory, config.json or the weights are missing, a file is damaged or truncated, or
            config.json contradicts the weights.
    """
    path = Path(path)
    if not path.is_dir():
        problem = "is a file" if path.exists() else "does not exist"
        raise ModelFilesError(
            f"{problem}; give the directory of a Hugging Face model (`hf download NAME --local-dir DIR`)"
            + download_hint(str(path))
        )
    config = _read_config(path)
    weights = _read_weights(path)
    if weights is None:
        return ModelFiles(path, config, _text_config(config), None, None, None)
    files = _with_sizes(path, config, weights)
    if (wrong := contradiction(files.config, files.shapes)) is not None:
        raise ModelFilesError(f"config.json has {wrong}; copy config.json and weights from the same model")
    return files


def with_overrides(files: ModelFiles, override: Mapping[str, Any]) -> ModelFiles:
    """Return the model with the fields of `model.override_config` in its config; sizes of weights stay."""
    return replace(files, config={**files.config, **override})


def is_config_alone(path: str | Path) -> bool:
    """Return whether a directory has a config.json but no weights, which is enough for a plan."""
    return (Path(path) / "config.json").is_file() and not has_weights(Path(path))


def read_config_alone(path: str | Path) -> ModelFiles:
    """Read a directory without weights; ModelFilesError for a damaged config.json."""
    return model_of_config(path, _read_config(Path(path)))


def model_of_config(path: str | Path, config: dict[str, Any]) -> ModelFiles:
    """Return the BF16 model that a config.json describes; its sizes are None for an unknown model type."""
    path = Path(path)
    try:
        tensors = index_of_config(path, config).tensors
    except ValueError:
        return ModelFiles(path, config, _text_config(config), None, None, None)
    return _with_sizes(path, config, dict(tensors))


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _with_sizes(path: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> ModelFiles:
    shapes = {name: info.shape for name, info in tensors.items()}
    nbytes = sum(info.nbytes for info in tensors.values())
    return ModelFiles(
        path, config, _text_config(config), sum(map(math.prod, shapes.values())), nbytes, len(shapes), shapes
    )


def _read_weights(path: Path) -> dict[str, TensorInfo] | None:
    """Return the tensors of a directory; None for PyTorch files, which are only checked for damage."""
    if (path / SAFETENSORS_INDEX).is_file():
        return _read_shards(path)
    if (path / SAFETENSORS_FILE).is_file():
        return read_safetensors_header(path / SAFETENSORS_FILE)
    for name in (TORCH_INDEX, TORCH_FILE):
        if (path / name).is_file():
            _check_torch_files(path, name)
            return None
    present = sorted(entry.name for entry in path.iterdir())[:8]
    raise ModelFilesError(
        f"has no weights: no {SAFETENSORS_FILE}, {SAFETENSORS_INDEX} or {TORCH_FILE} (it has {', '.join(present)}); "
        "copy them there"
    )


def _read_shards(path: Path) -> dict[str, TensorInfo]:
    weight_map = _read_json(path / SAFETENSORS_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFilesError(f"{SAFETENSORS_INDEX} has no weight_map; copy it again")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelFilesError(f"{SAFETENSORS_INDEX}: weight_map must map tensors to file names; copy it again")
    tensors: dict[str, TensorInfo] = {}
    for name in sorted(set(weight_map.values())):
        if not (path / name).is_file():
            raise ModelFilesError(f"{name} is missing, but {SAFETENSORS_INDEX} lists it; copy it there")
        shard = read_safetensors_header(path / name)
        absent = [tensor for tensor, file in weight_map.items() if file == name and tensor not in shard]
        if absent:
            raise ModelFilesError(f"{name} lacks {absent[0]}, but {SAFETENSORS_INDEX} lists it there; copy both again")
        tensors |= shard
    return tensors


def _check_torch_files(path: Path, name: str) -> None:
    names = [name]
    if name.endswith(".json"):
        names = sorted(set((_read_json(path / name).get("weight_map") or {}).values()))
    for file in names:
        if not (path / file).is_file():
            raise ModelFilesError(f"{file} is missing, but {name} lists it; copy it there")
        if os.path.getsize(path / file) == 0 or not zipfile.is_zipfile(path / file):
            raise ModelFilesError(f"{file} is damaged or truncated: not a complete PyTorch file; copy it again")


def _read_config(folder: Path) -> dict[str, Any]:
    config = _read_json(folder / "config.json", "a Hugging Face model needs one")
    if (problem := config_problem(config)) is not None:
        raise ModelFilesError(f"config.json: {problem}")
    return config


def _read_json(path: Path, reason: str = "") -> dict[str, Any]:
    if not path.is_file():
        raise ModelFilesError(f"has no {path.name}: {reason}; copy it there")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelFilesError(f"{path.name} is damaged ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise ModelFilesError(f"{path.name} does not hold a JSON object; copy it again")
    return value
