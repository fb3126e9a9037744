"""LoRA adapters on a model's linear layers: made or read with peft, merged when weights leave, written for peft.

The base weights are frozen. An adapter (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models") adds
scale * B @ A to the weight [out, in] of its layer, with A [r, in], B [out, r] and scale = alpha / r. Those who receive
weights never see adapters: `merged_view` shows the model under its own names.
"""

from __future__ import annotations

import copy
import difflib
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from verl.config import LoraOptions

logger = logging.getLogger(__name__)

DIRECTORY = "lora_adapter"  # in a checkpoint
_TARGETS = "actor_rollout_ref.model.target_modules"
_NAME = "default"  # peft's name of the only adapter
_WEIGHTS_FILE, _CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class Adapter:
    """What is added to one weight: `scale` * b @ a, with a [r, in] and b [out, r] float32, sharded as the weight is."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    def merged(self, weight: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        """weight [out, in] + scale * b @ a, computed in float32 and rounded once to `dtype`, else the weight's own.

        Each rank computes the rows that it holds; only `a` is gathered. Collective.
        """
        a = self.a.full_tensor() if isinstance(self.a, DTensor) else self.a
        if not isinstance(weight, DTensor):
            return _added(weight, a, self.b, self.scale, dtype)
        assert isinstance(self.b, DTensor) and self.b.placements == weight.placements
        assert all(placement.is_replicate() or placement.is_shard(0) for placement in weight.placements)
        rows = _added(weight.to_local(), a, self.b.to_local(), self.scale, dtype)
        return DTensor.from_local(
            rows, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
        )


def _added(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, dtype: torch.dtype | None
) -> torch.Tensor:
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale).to(dtype or weight.dtype)


def add_adapters(model: PreTrainedModel, options: LoraOptions, *, fill: bool) -> None:
    """Freeze the model and put adapters on its layers.

    A is drawn as peft draws it, from a generator with the seed that torch was given, and B is zero, so that the first
    weights are the base model's; or both come from `options.adapter_path`.

    Args:
        fill: give the adapters values; without, they are made without storage.

    Raises:
        ValueError: a module that the model lacks or that cannot have an adapter; an adapter of other layers or shapes.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = _target_names(model, options)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=options.alpha,
        target_modules=targets,
        base_model_name_or_path=model.config.name_or_path,
        **{name: value for name, value in options.shaping.items() if not name.startswith("layers_")},
    )
    _check_peft_keeps(config, model)
    inject_adapter_in_model(config, model, adapter_name=_NAME, low_cpu_mem_usage=not fill)
    made = dict(_layers(model))
    assert sorted(made) == sorted(targets)
    for layer in made.values():
        layer.lora_A.float(), layer.lora_B.float()
    config.target_modules = _short_names(model, targets)
    model.peft_config = {_NAME: config}
    if fill:
        if options.adapter_path is None:
            _draw(made)
        else:
            _read(made, options.adapter_path)
        _log(model, options, len(made))


def has_adapters(model: nn.Module) -> bool:
    """Whether `add_adapters` was called on the model."""
    return next(_layers(model), None) is not None


def merged_view(state: dict[str, torch.Tensor], model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Adapter]]:
    """A state dict under the names of the model without adapters, and what has to be added to which of its weights."""
    state = dict(state)
    adapters: dict[str, Adapter] = {}
    for name, layer in _layers(model):
        a, b = state.pop(_key(name, "A")), state.pop(_key(name, "B"))
        adapters[f"{name}.weight"] = Adapter(a.detach(), b.detach(), layer.scaling[_NAME])
    inner = tuple(name.removesuffix(".weight") + ".base_layer." for name in adapters)
    plain = {
        name.replace(".base_layer.", ".") if name.startswith(inner) else name: value for name, value in state.items()
    }
    return plain, adapters


def write_adapter(model: PreTrainedModel, path: Path, *, writes: bool) -> None:
    """Write adapter_config.json and adapter_model.safetensors, float32, as `PeftModel.from_pretrained` reads them.

    Collective; only the rank with `writes` does.
    """
    tensors = {}
    for name, layer in _layers(model):
        for part, parameter in (("A", layer.lora_A[_NAME].weight), ("B", layer.lora_B[_NAME].weight)):
            tensor = parameter.detach()
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if writes:
                tensors[_file_key(name, part)] = whole.cpu().contiguous()
    if writes:
        path.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path / _WEIGHTS_FILE, metadata={"format": "pt"})
        _config(model).save_pretrained(str(path))


def check_same_scale(model: nn.Module, path: Path) -> None:
    """Refuse to resume where the saved adapters in `path` count for more or less than the model's own.

    Raises:
        ValueError: another rank or alpha.
    """
    from peft import LoraConfig

    saved, ours = LoraConfig.from_pretrained(str(path)), _config(model)
    keys = {"r": "lora_rank", "lora_alpha": "lora_alpha"}
    for field in (*keys, "use_rslora", "rank_pattern", "alpha_pattern"):
        theirs, here = getattr(saved, field), getattr(ours, field)
        if theirs != here:
            name = f"actor_rollout_ref.model.{keys[field]}" if field in keys else field
            fix = f"set {keys[field]}={theirs}" if field in keys else "give the lora_adapter_path of the saved run"
            raise ValueError(
                f"{name}={here}: {path} was saved with {theirs}; {fix} to resume, or start afresh "
                "(trainer.resume_mode=disable)"
            )


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of every layer with an adapter."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _config(model: nn.Module) -> Any:
    return model.peft_config[_NAME]  # type: ignore[index, union-attr]


def _key(name: str, part: str) -> str:
    return f"{name}.lora_{part}.{_NAME}.weight"


def _file_key(name: str, part: str) -> str:
    return f"base_model.model.{name}.lora_{part}.weight"


# ---- which layers ---------------------------------------------------------------------------------------------------


def _target_names(model: PreTrainedModel, options: LoraOptions) -> list[str]:
    """Full names of the layers that get an adapter."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    modules = {name: module for name, module in model.named_modules() if name}
    head = model.get_output_embeddings()
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear) and module is not head]
    wanted = linear if options.target_modules == "all-linear" else options.target_modules
    rule = LoraConfig(
        target_modules=wanted,
        exclude_modules=options.exclude_modules,
        **{name: value for name, value in options.shaping.items() if name.startswith("layers_")},
    )
    found = [name for name in modules if check_target_module_exists(rule, name)]
    if options.adapter_path is None:
        _check_all_known(model, options, linear)
    if not found:
        raise ValueError(
            f"{_TARGETS}={options.target_modules}, exclude_modules={options.exclude_modules}: no layer of "
            f"{type(model).__name__} is left; it has {', '.join(_ends(linear))}"
        )
    aliases = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {*aliases, *aliases.values()}
    for name in found:
        if not isinstance(modules[name], nn.Linear):
            raise ValueError(
                f"{_TARGETS}: {name} is a {type(modules[name]).__name__}; only linear layers can have an adapter: "
                f"{', '.join(_ends(linear))}"
            )
        if f"{name}.weight" in tied:
            raise ValueError(
                f"{_TARGETS}: {name} shares its weight with the embeddings, which an adapter would change too; leave "
                "it out"
            )
    return found


def _check_all_known(model: PreTrainedModel, options: LoraOptions, linear: list[str]) -> None:
    """peft takes a list of which some names fit nothing; a run should not train less than it was told to."""
    for key in ("target_modules", "exclude_modules"):
        given = getattr(options, key)
        for wanted in given if isinstance(given, list) else ():
            if not any(name == wanted or name.endswith(f".{wanted}") for name, _ in model.named_modules()):
                ends = _ends(linear)
                near = difflib.get_close_matches(wanted.rpartition(".")[2], ends, n=3, cutoff=0.5) or ends
                raise ValueError(
                    f"actor_rollout_ref.model.{key}: {type(model).__name__} has no {wanted}; near it are "
                    f"{', '.join(near)}"
                )


def _ends(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _short_names(model: nn.Module, targets: list[str]) -> list[str]:
    """The ends of names that stand for just these layers, or else the whole names."""
    ends = _ends(targets)
    stands_for = {
        name for name, _ in model.named_modules() if any(name == end or name.endswith(f".{end}") for end in ends)
    }
    return ends if stands_for == set(targets) else sorted(targets)


def _check_peft_keeps(config: Any, model: PreTrainedModel) -> None:
    """peft takes some names of mixture-of-experts models for the packed experts, and would put adapters there."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    converted = copy.deepcopy(config)
    names = set(config.target_modules)
    try:
        convert_peft_config_for_transformers(converted, model=model, conversions=None)
        lost = names - set(converted.target_modules)
    except ValueError as error:
        raise ValueError(f"{_TARGETS}: {error}") from None
    if lost:
        raise ValueError(
            f"{_TARGETS}: peft takes {', '.join(_ends(lost))} of {type(model).__name__} for packed experts, which "
            f"cannot have adapters yet; set actor_rollout_ref.model.exclude_modules=[{','.join(_ends(lost))}]"
        )


# ---- first values ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def _draw(layers: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(torch.initial_seed())
    for layer in layers.values():
        a, b = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
        drawn = torch.empty(a.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        a.copy_(drawn)
        b.zero_()


@torch.no_grad()
def _read(layers: dict[str, Any], path: Path) -> None:
    place = f"actor_rollout_ref.model.lora_adapter_path={path}"
    saved = load_file(path / _WEIGHTS_FILE)
    for name, layer in layers.items():
        for part, parameter in (("A", layer.lora_A[_NAME].weight), ("B", layer.lora_B[_NAME].weight)):
            tensor = saved.pop(_file_key(name, part), None)
            if tensor is None or tensor.shape != parameter.shape:
                what = "nothing" if tensor is None else f"shape {list(tensor.shape)}"
                raise ValueError(
                    f"{place}: has {what} for {name}, where lora_{part} of shape {list(parameter.shape)} belongs; use "
                    "an adapter that was trained on this model"
                )
            parameter.copy_(tensor)
    if saved:
        raise ValueError(f"{place}: {min(saved)} belongs to no layer; use an adapter that was trained on this model")


def _log(model: nn.Module, options: LoraOptions, layers: int) -> None:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in model.parameters()) - trained
    source = options.adapter_path or "new"
    logger.info(
        "LoRA, rank %d, on %d layers (%s): %d parameters beside %d", options.rank, layers, source, trained, whole
    )
