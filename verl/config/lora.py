"""LoRA adapters of a run, from the LoRA keys of `actor_rollout_ref.model` and a saved adapter; loads no tensors."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl.config.model import ModelConfig
from verl.config.schema import show
from verl.utils.model_dir.errors import ModelFilesError
from verl.utils.model_dir.safetensors_header import read_safetensors_header

ALL_LINEAR = "all-linear"
_MODEL = "actor_rollout_ref.model."
_CONFIG_FILE, _WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# Fields of an adapter's config that change its layers or its scale; peft's LoraConfig gets them.
_SHAPING = ("use_rslora", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern")
# Fields that are supported, or do not affect the computation. An adapter that sets any other field is refused.
_KNOWN = {
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("peft_version", "megatron_core", "qalora_group_size", "init_lora_weights", "lora_dropout", "eva_config"),
    *("r", "lora_alpha", "target_modules", "exclude_modules", "runtime_config", *_SHAPING),
}
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraOptions:
    """Properties of the adapters.

    Attributes:
        rank, alpha: an adapter adds alpha / rank * B @ A to its layer's weight.
        target_modules: layers with an adapter: names or their endings, a regular expression for whole names, or
            `all-linear`.
        exclude_modules: layers without an adapter: names or their endings, or a regular expression.
        adapter_path: directory of their first values; None: start with B = 0.
        shaping: further fields of the saved adapter's config, for peft's LoraConfig.
    """

    rank: int
    alpha: float
    target_modules: str | list[str]
    exclude_modules: str | list[str] | None = None
    adapter_path: Path | None = None
    shaping: dict[str, Any] = field(default_factory=dict)


def lora_options(model: ModelConfig) -> LoraOptions | None:
    """Return the adapters that a model section defines, or None for a model without adapters.

    Raises:
        ValueError: keys contradict each other or the saved adapter, or the saved adapter is missing, damaged or not
            supported.
    """
    changed = {
        name: getattr(model, name)
        for name in ("lora_rank", "lora_alpha", "target_modules", "exclude_modules")
        if getattr(model, name) != getattr(ModelConfig(), name)
    }
    if model.lora_adapter_path is not None:
        return _of_adapter(Path(model.lora_adapter_path), changed)
    if model.lora_rank == 0:
        if "target_modules" in changed:
            raise ValueError(
                f"{_MODEL}target_modules={show(changed['target_modules'])}: requires adapters, but {_MODEL}"
                "lora_rank=0; set lora_rank, or leave target_modules out"
            )
        return None
    _check_modules("target_modules", model.target_modules)
    _check_modules("exclude_modules", model.exclude_modules)
    return LoraOptions(model.lora_rank, model.lora_alpha, model.target_modules, model.exclude_modules)


def _check_modules(name: str, value: str | list[str] | None) -> None:
    if isinstance(value, list):
        if not value and name == "target_modules":
            raise ValueError(f"{_MODEL}{name}=[]: no layer would be trained; use {ALL_LINEAR}, or a list of names")
    elif value == "":
        raise ValueError(f"{_MODEL}{name}='': matches no layer; use {ALL_LINEAR}, a list of names, or leave it out")
    elif value is not None and value != ALL_LINEAR and (error := _pattern_error(value)) is not None:
        raise ValueError(f"{_MODEL}{name}={value}: is not a regular expression ({error}); use a list")


def _of_adapter(path: Path, changed: dict[str, Any]) -> LoraOptions:
    """Return the properties of a saved adapter; `changed` are the LoRA keys that are not at their defaults."""
    location = f"{_MODEL}lora_adapter_path={path}"
    saved = _read_adapter_config(path, location)
    rank, alpha = saved.get("r", 0), saved.get("lora_alpha", 0)
    targets, excluded = saved.get("target_modules", []), saved.get("exclude_modules")
    if (problem := _shape_problem(saved)) is not None:
        raise ValueError(f"{location}: {_CONFIG_FILE} has {problem}; save the adapter with peft again")
    _check_ranks(path, location, saved)
    of_key = {"lora_rank": rank, "lora_alpha": alpha, "target_modules": targets, "exclude_modules": excluded}
    for name, value in changed.items():
        if _as_set(value) != _as_set(of_key[name]):
            raise ValueError(
                f"{_MODEL}{name}={show(value)}: the adapter in {path} has {show(of_key[name])}; use that, or leave "
                f"{name} out"
            )
    shaping = {name: saved[name] for name in _SHAPING if saved.get(name)}
    return LoraOptions(rank, alpha, targets, excluded, adapter_path=path, shaping=shaping)


def _shape_problem(saved: dict[str, Any]) -> str | None:
    """Return the first field of a saved adapter's config that no adapter has, and what it must be; None without one."""
    ranks, scales = saved.get("rank_pattern") or {}, saved.get("alpha_pattern") or {}
    if not _is_rank(saved.get("r")):
        return f"r={show(saved.get('r'))}, which must be a whole number of at least 1"
    if not _is_scale(saved.get("lora_alpha")):
        return f"lora_alpha={show(saved.get('lora_alpha'))}, which must be a number above 0"
    for name in ("target_modules", "exclude_modules"):
        value = saved.get(name)
        if name == "exclude_modules" and value in (None, []):
            continue
        of_text = isinstance(value, list) and value and all(isinstance(item, str) and item for item in value)
        if not of_text and not (isinstance(value, str) and value):
            return f"{name}={show(value)}, which must be a list of names, or a regular expression"
        if isinstance(value, str) and value != ALL_LINEAR and (error := _pattern_error(value)) is not None:
            return f"{name}={value!r}, which is not a regular expression ({error})"
    for name, pattern, is_valid in (("rank_pattern", ranks, _is_rank), ("alpha_pattern", scales, _is_scale)):
        if not isinstance(pattern, dict) or not all(is_valid(value) for value in pattern.values()):
            return f"{name}={show(pattern)}, which must map names of layers to numbers above 0"
        for key in pattern:
            if (error := _pattern_error(key)) is not None:
                return f"{name}.{key}, which is not a regular expression ({error})"
    if not isinstance(saved.get("use_rslora", False), bool | None):
        return f"use_rslora={show(saved['use_rslora'])}, which must be true or false"
    return None


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_scale(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _pattern_error(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return str(error)
    return None


def _check_ranks(path: Path, location: str, saved: dict[str, Any]) -> None:
    """Check that the weights have the rank of the config.

    Raises:
        ValueError: names the tensor and both values.
    """
    if saved.get("rank_pattern"):
        return
    for name, info in read_safetensors_header(path / _WEIGHTS_FILE).items():
        if name.endswith(".lora_A.weight") and len(info.shape) == 2 and info.shape[0] != saved["r"]:
            raise ValueError(
                f"{location}: {_CONFIG_FILE} has r={saved['r']}, but {name} in {_WEIGHTS_FILE} has rank "
                f"{info.shape[0]}; copy both files from the same adapter"
            )


def _as_set(value: Any) -> Any:
    return set(value) if isinstance(value, list) else value


def _read_adapter_config(path: Path, location: str) -> dict[str, Any]:
    """Return the config of a saved adapter, after checks that its weights are complete and its kind is supported."""
    if not os.path.isdir(path):
        problem = "is a file" if os.path.exists(path) else "no such directory"
        raise ValueError(f"{location}: {problem}; give the directory of a peft adapter")
    for name in (_CONFIG_FILE, _WEIGHTS_FILE):
        if not (path / name).is_file():
            present = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
            raise ValueError(
                f"{location}: has no {name} (it has {present}); save the adapter with peft's save_pretrained"
            )
    try:
        saved = json.loads((path / _CONFIG_FILE).read_text(encoding="utf-8"))
        read_safetensors_header(path / _WEIGHTS_FILE)
    except ModelFilesError as error:
        raise ValueError(f"{location}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{location}: {_CONFIG_FILE} is damaged ({error}); copy it again") from None
    if not isinstance(saved, dict) or saved.get("peft_type") != "LORA":
        kind = saved.get("peft_type") if isinstance(saved, dict) else None
        raise ValueError(f"{location}: {_CONFIG_FILE} has peft_type={kind}; only adapters of kind LORA are supported")
    for name, value in saved.items():
        if name not in _KNOWN and value not in (None, False, "none") and value != [] and value != {}:
            raise ValueError(f"{location}: {_CONFIG_FILE} has {name}={value}, which is not supported; use plain LoRA")
    if saved.get("init_lora_weights") not in _PLAIN_INITS:
        raise ValueError(
            f"{location}: {_CONFIG_FILE} has init_lora_weights={saved['init_lora_weights']}, which requires a modified "
            "base model; convert it to plain LoRA (path_initial_model_for_weight_conversion of save_pretrained)"
        )
    return saved


def matches(name: str, modules: str | list[str]) -> bool:
    """Return True if `target_modules`, unless it is `all-linear`, selects a module; this is peft's rule.

    Args:
        name: dotted name of the module.
        modules: names or their endings, or a regular expression for whole names.
    """
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(name == wanted or name.endswith(f".{wanted}") for wanted in modules)


def adapter_parameters(options: LoraOptions, shapes: dict[str, tuple[int, ...]]) -> int:
    """Return the estimated number of elements of all adapters.

    With `all-linear`, embeddings, output heads and single experts have no adapter.

    Args:
        shapes: shapes of the checkpoint's tensors by name.
    """
    total = 0
    for tensor, shape in shapes.items():
        name, _, kind = tensor.rpartition(".")
        if kind != "weight" or len(shape) != 2:
            continue
        if options.target_modules == ALL_LINEAR:
            wanted = not any(part in name for part in ("embed", "lm_head", ".experts.", "wte", "wpe"))
        else:
            wanted = matches(name, options.target_modules)
        if wanted and not (options.exclude_modules and matches(name, options.exclude_modules)):
            total += options.rank * sum(shape)
    return total
