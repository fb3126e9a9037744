"""Write a sharded model as a Hugging Face directory that differs from its source only in the weights.

| file | content |
|---|---|
| weights | in the dtype of each tensor of the source, or in one dtype |
| config.json | the source's, with the fields that `override_config`, the dtype or a value head change |
| other files | copies of the source's, see `verl.utils.model_dir.copy_files` |
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig, PreTrainedModel

from verl.utils.dtypes import DTYPE_NAMES
from verl.utils.model_dir.copy_files import CONFIG_FILE, copy_model_files
from verl.utils.model_dir.index import SAFETENSORS_INDEX, read_checkpoint_index, read_json_object
from verl.utils.safetensors_file import save_safetensors
from verl.workers.engine.export import WeightExport, gather_all
from verl.workers.engine.rank_errors import RankErrors
from verl.workers.engine.value_head import HEAD, has_value_head

HF_DIRECTORY = "huggingface"  # in the actor's or critic's part of a checkpoint
_MAX_FILE_BYTES = 5 * 10**9
_TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPE_KEYS = ("dtype", "torch_dtype")


def write_hf_directory(
    export: WeightExport,
    model: PreTrainedModel,
    path: Path,
    *,
    source: Path,
    tokenizer: Path,
    override: Mapping[str, Any],
    dtype: str = "auto",
    writes: bool,
    group: dist.ProcessGroup,
) -> None:
    """Write config, weights and the files that the model has in common with its source. Collective.

    Args:
        export: the model's export.
        source: directory that the model was read from.
        tokenizer: directory of its tokenizer.
        override: `override_config` of the model section.
        dtype: `auto` for the dtype of each weight in `source`, else `float32` (`fp32`) or `bfloat16` (`bf16`).
        writes: True on the one rank that writes the files.
        group: the ranks that hold the model.

    Raises:
        RankFilesError: a file cannot be read or written; raised on all ranks, after they have gathered all weights.
    """
    errors = RankErrors()
    weights: _WeightFiles | None = None
    with errors.collect():
        if writes:
            one_dtype = None if dtype == "auto" else DTYPE_NAMES[dtype]
            _write_common_files(model, path, source, tokenizer, override, one_dtype)
            weights = _WeightFiles(path, _ExportDtypes(source, one_dtype))
    for name, tensor in gather_all(export.units()):
        with errors.collect():
            if weights is not None and errors.first is None:
                weights.add(name, tensor)
    with errors.collect():
        if weights is not None and errors.first is None:
            weights.close()
    errors.raise_together(group)


def _write_common_files(
    model: PreTrainedModel,
    path: Path,
    source: Path,
    tokenizer: Path,
    override: Mapping[str, Any],
    dtype: str | None,
) -> None:
    path.mkdir(parents=True, exist_ok=True)
    copy_model_files(source, tokenizer, path, generates=not has_value_head(model))
    config = _saved_config(read_json_object(source / CONFIG_FILE), model, override, dtype)
    (path / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _saved_config(
    source: dict[str, Any], model: PreTrainedModel, override: Mapping[str, Any], dtype: str | None
) -> dict[str, Any]:
    """Return the source's config.json with the fields that differ in the trained model."""
    trained = model.config
    if source.get("model_type") != trained.model_type:
        # The text model of a multi-modal checkpoint.
        fields = json.loads(trained.to_json_string())
        dtypes = [source[key] for key in _DTYPE_KEYS if key in source]
        config = {name: value for name, value in fields.items() if name not in _DTYPE_KEYS}
        config |= {"dtype": dtypes[0]} if dtypes else {}
    else:
        config = dict(source)
        for name, value in override.items():
            if name != "attn_implementation":
                _override(config, trained, name, value)
    if has_value_head(model):
        changed = json.loads(trained.to_json_string(use_diff=False))
        config |= {name: changed[name] for name in ("architectures", "id2label", "label2id", "tie_word_embeddings")}
    if dtype is not None:
        _set_dtype(config, dtype)
        if not any(key in config for key in _DTYPE_KEYS):
            config["dtype"] = dtype
    return config


def _override(config: dict[str, Any], trained: PreTrainedConfig, name: str, value: Any) -> None:
    """Set a field as `from_pretrained` does: under its stored name, and a section field by field."""
    name = name if name in config else trained.attribute_map.get(name, name)
    if isinstance(getattr(trained, name, None), PreTrainedConfig) and isinstance(value, Mapping):
        value = {**config.get(name, {}), **value}
    config[name] = value


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Replace every dtype that the config names, also in its sections."""
    for key, value in config.items():
        if key in _DTYPE_KEYS:
            config[key] = dtype
        elif isinstance(value, dict):
            config[key] = value = dict(value)
            _set_dtype(value, dtype)


class _ExportDtypes:
    """Dtype of each exported weight: that of the source, or one dtype for all."""

    def __init__(self, source: Path, dtype: str | None):
        self._all = None if dtype is None else getattr(torch, dtype)
        tensors = {} if dtype is not None else read_checkpoint_index(source).tensors
        self._by_name = {name: _TORCH_DTYPES[t.dtype] for name, t in tensors.items() if t.dtype in _TORCH_DTYPES}
        counts: Counter[torch.dtype] = Counter()
        for name, stored in self._by_name.items():
            counts[stored] += tensors[name].nbytes
        # For weights with other names than in the source, such as those of a model without its prefix.
        self._most = counts.most_common(1)[0][0] if counts else None

    def cast(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the weight on the CPU. A value head that the source lacks keeps its dtype, float32."""
        if not tensor.is_floating_point():
            return tensor.cpu()
        new_head = name.startswith(f"{HEAD}.") and name not in self._by_name
        default = None if new_head else self._most
        return tensor.cpu().to(self._all or self._by_name.get(name) or default or tensor.dtype)


class _WeightFiles:
    """Writer of safetensors files of at most 5 GB, and of their index if there are several.

    At most one file is held in memory.
    """

    def __init__(self, path: Path, dtypes: _ExportDtypes):
        self._path, self._dtypes = path, dtypes
        self._tensors: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self._files: list[list[str]] = []
        self._total = self._parameters = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        tensor = self._dtypes.cast(name, tensor)
        size = tensor.numel() * tensor.element_size()
        if self._tensors and self._bytes + size > _MAX_FILE_BYTES:
            self._flush()
        self._tensors[name] = tensor
        self._bytes += size
        self._total += size
        self._parameters += tensor.numel()

    def _part(self, number: int) -> Path:
        return self._path / f"part-{number}.safetensors"

    def _flush(self) -> None:
        save_safetensors(self._tensors, self._part(len(self._files)))
        self._files.append(list(self._tensors))
        self._tensors, self._bytes = {}, 0

    def close(self) -> None:
        """Write the remaining tensors, and rename the files, whose final names contain the number of files."""
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
        metadata = {"total_parameters": self._parameters, "total_size": self._total}
        index = {"metadata": metadata, "weight_map": weight_map}
        (self._path / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
