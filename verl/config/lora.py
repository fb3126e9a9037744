"""What the LoRA keys of `actor_rollout_ref.model` and an adapter to start from amount to. No tensor is loaded."""

from __future__ import annotations

import json
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
# Fields of an adapter's config that say what its weights are, or nothing of consequence. Any other that is set changes
# what the adapter computes.
_SHAPING = ("use_rslora", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern")
_KNOWN = {
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("peft_version", "megatron_core", "qalora_group_size", "init_lora_weights", "lora_dropout", "eva_config"),
    *("r", "lora_alpha", "target_modules", "exclude_modules", "runtime_config", *_SHAPING),
}
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraOptions:
    """Adapters as they will be made or read.

    Attributes:
        rank, alpha: an adapter adds alpha / rank * B @ A to its layer's weight.
        target_modules: names or ends of names, or a regular expression over whole names, or `all-linear`.
        exclude_modules: names, ends of names or an expression of what gets none.
        adapter_path: where their first values are; None to start from B = 0.
        shaping: further fields of that adapter's own config, for peft's LoraConfig.
    """

    rank: int
    alpha: float
    target_modules: str | list[str]
    exclude_modules: str | list[str] | None = None
    adapter_path: Path | None = None
    shaping: dict[str, Any] = field(default_factory=dict)


def lora_options(model: ModelConfig) -> LoraOptions | None:
    """The adapters that a model section asks for, None for none.

    Raises:
        ValueError: keys that contradict each other or the adapter to start from; one that is missing, damaged or of a
            kind that is not supported.
    """
    changed = {
        name: getattr(model, name)
        for name in ("lora_rank", "lora_alpha", "target_modules", "exclude_modules")
        if getattr(model, name) != getattr(ModelConfig(), name)
    }
    if model.lora_adapter_path is not None:
        return _of_adapter(Path(model.lora_adapter_path), changed)
    if model.lora_rank == 0:
        for name in ("target_modules", "exclude_modules"):
            if name in changed:
                raise ValueError(
                    f"{_MODEL}{name}={show(changed[name])}: there are no adapters with {_MODEL}lora_rank=0; set "
                    f"lora_rank, or leave {name} out"
                )
        return None
    _check_modules("target_modules", model.target_modules)
    _check_modules("exclude_modules", model.exclude_modules)
    return LoraOptions(model.lora_rank, model.lora_alpha, model.target_modules, model.exclude_modules)


def _check_modules(name: str, value: str | list[str] | None) -> None:
    if isinstance(value, list):
        if not value and name == "target_modules":
            raise ValueError(f"{_MODEL}{name}=[]: no layer would be trained; use {ALL_LINEAR}, or name some")
    elif value is not None and value != ALL_LINEAR:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{_MODEL}{name}={value}: is no regular expression ({error}); use a list") from None


def _of_adapter(path: Path, changed: dict[str, Any]) -> LoraOptions:
    place = f"{_MODEL}lora_adapter_path={path}"
    given = _read_config(path, place)
    theirs = {
        "lora_rank": given.get("r"),
        "lora_alpha": given.get("lora_alpha"),
        "target_modules": given.get("target_modules"),
        "exclude_modules": given.get("exclude_modules"),
    }
    if type(theirs["lora_rank"]) is not int or not isinstance(theirs["lora_alpha"], int | float):
        raise ValueError(f"{place}: {_CONFIG_FILE} has no r or lora_alpha; save the adapter with peft again")
    if not isinstance(theirs["target_modules"], str | list):
        raise ValueError(f"{place}: {_CONFIG_FILE} has no target_modules; save the adapter with peft again")
    for name, value in changed.items():
        if _as_set(value) != _as_set(theirs[name]):
            raise ValueError(
                f"{_MODEL}{name}={show(value)}: the adapter in {path} has {show(theirs[name])}; use that, or leave "
                f"{name} out"
            )
    shaping = {name: given[name] for name in _SHAPING if given.get(name)}
    return LoraOptions(*theirs.values(), adapter_path=path, shaping=shaping)


def _as_set(value: Any) -> Any:
    return set(value) if isinstance(value, list) else value


def _read_config(path: Path, place: str) -> dict[str, Any]:
    """An adapter's config, its weights' file being whole and of a kind that is supported."""
    if not os.path.isdir(path):
        problem = "is a file" if os.path.exists(path) else "no such directory"
        raise ValueError(f"{place}: {problem}; give the directory of a peft adapter")
    for name in (_CONFIG_FILE, _WEIGHTS_FILE):
        if not (path / name).is_file():
            present = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
            raise ValueError(f"{place}: has no {name} (it has {present}); save the adapter with peft's save_pretrained")
    try:
        given = json.loads((path / _CONFIG_FILE).read_text(encoding="utf-8"))
        read_safetensors_header(path / _WEIGHTS_FILE)
    except ModelFilesError as error:
        raise ValueError(f"{place}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{place}: {_CONFIG_FILE} is damaged ({error}); copy it again") from None
    if not isinstance(given, dict) or given.get("peft_type") != "LORA":
        kind = given.get("peft_type") if isinstance(given, dict) else None
        raise ValueError(f"{place}: is an adapter of kind {kind}; only LORA is supported")
    for name, value in given.items():
        if name not in _KNOWN and value not in (None, False, "none") and value != [] and value != {}:
            raise ValueError(f"{place}: {_CONFIG_FILE} has {name}={value}, which is not supported; use plain LoRA")
    if given.get("init_lora_weights") not in _PLAIN_INITS:
        raise ValueError(
            f"{place}: {_CONFIG_FILE} has init_lora_weights={given['init_lora_weights']}, which belongs to a base model"
            " that was changed; convert it to plain LoRA (path_initial_model_for_weight_conversion of save_pretrained)"
        )
    return given


def matches(name: str, modules: str | list[str]) -> bool:
    """Whether a module's dotted name is one that `target_modules` stands for, `all-linear` aside; peft's rule."""
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(name == wanted or name.endswith(f".{wanted}") for wanted in modules)


def adapter_parameters(options: LoraOptions, shapes: dict[str, tuple[int, ...]]) -> int:
    """Elements of the adapters, guessed from the checkpoint's tensors by name and shape.

    Embeddings, output heads and what a checkpoint keeps expert by expert have none under `all-linear`.
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
