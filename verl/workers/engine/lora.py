"""LoRA adapters on a model's linear layers: create or read them with peft, merge them for export, write them for peft.

The base weights are frozen. An adapter (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models") adds
scale * B @ A to the weight [out, in] of its layer, with A [r, in], B [out, r] and scale = alpha / r. Receivers of the
weights never see adapters: `merged_view` shows the model under the names of its checkpoint.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from verl.config import LoraOptions
from verl.utils.safetensors_file import save_safetensors
from verl.workers.engine.host_memory import to_device
from verl.workers.engine.lora_targets import check_peft_keeps, shortest_names, target_names

logger = logging.getLogger(__name__)

DIRECTORY = "lora_adapter"  # in a checkpoint
_NAME = "default"  # peft's name of a model's only adapter
_WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """The update `scale` * b @ a of one weight, with a [r, in] and b [out, r] float32, sharded like the weight."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    def to(self, device: torch.device | None) -> Adapter:
        """Return the adapter with its tensors on a device; None for where they are."""
        return Adapter(to_device(self.a, device), to_device(self.b, device), self.scale)

    def merged(self, weight: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        """Return weight [out, in] + scale * b @ a, computed in float32 and rounded once to `dtype`. Collective.

        Each rank computes the rows that it holds; only `a` is gathered.

        Args:
            dtype: dtype of the result; None for the dtype of the weight.
        """
        a = self.a.full_tensor() if isinstance(self.a, DTensor) else self.a
        if not isinstance(weight, DTensor):
            return _add_product(weight, a, self.b, self.scale, dtype)
        assert isinstance(self.b, DTensor) and self.b.placements == weight.placements
        assert all(placement.is_replicate() or placement.is_shard(0) for placement in weight.placements)
        rows = _add_product(weight.to_local(), a, self.b.to_local(), self.scale, dtype)
        return DTensor.from_local(
            rows, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
        )


def _add_product(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, dtype: torch.dtype | None
) -> torch.Tensor:
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale).to(dtype or weight.dtype)


def add_adapters(model: PreTrainedModel, options: LoraOptions, *, fill: bool) -> None:
    """Freeze the model and add adapters to its layers.

    A is initialized as in peft, from a generator with torch's initial seed. B is zero, so the first weights are those
    of the base model. With `options.adapter_path` both are read from there instead.

    Args:
        fill: initialize the adapters; otherwise they are created without storage.

    Raises:
        ValueError: an unknown module, or a module that cannot have an adapter; the adapter at `options.adapter_path`
            belongs to other layers or has other shapes.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = target_names(model, options)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # peft computes with it as with any number
        target_modules=targets,
        base_model_name_or_path=model.config.name_or_path,
        **{name: value for name, value in options.shaping.items() if not name.startswith("layers_")},
    )
    check_peft_keeps(config, model)
    inject_adapter_in_model(config, model, adapter_name=_NAME, low_cpu_mem_usage=not fill)
    layers = dict(_lora_layers(model))
    assert sorted(layers) == sorted(targets)
    for layer in layers.values():
        layer.lora_A.float(), layer.lora_B.float()
    config.target_modules = shortest_names(model, targets)
    model.peft_config = {_NAME: config}  # type: ignore[dict-item]  # transformers' protocol of a config is incomplete
    if fill:
        if options.adapter_path is None:
            _initialize(layers)
        else:
            _read_adapter(layers, options.adapter_path)
        _log_sizes(model, options, len(layers))


def has_adapters(model: nn.Module) -> bool:
    """Return True if `add_adapters` was called on the model."""
    return next(_lora_layers(model), None) is not None


class LayerAdapter:
    """The adapter of one layer in a forward pass.

    Attributes:
        base_layer: the layer without it.
    """

    def __init__(self, layer: Any):
        self._layer, self.base_layer = layer, layer.base_layer

    def update(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the adapter adds to the output: scale * B @ A @ x, for x [..., in]."""
        a, b = self._layer.lora_A[_NAME], self._layer.lora_B[_NAME]
        return self._layer.scaling[_NAME] * b(a(x.to(a.weight.dtype))).to(x.dtype)

    def factors(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors of the update: scale * A @ x [..., r], and B [out, r], in the dtype of x."""
        a, b = self._layer.lora_A[_NAME], self._layer.lora_B[_NAME]
        return (self._layer.scaling[_NAME] * a(x.to(a.weight.dtype))).to(x.dtype), b.weight.to(x.dtype)


def adapter_of(module: nn.Module) -> LayerAdapter | None:
    """Return the adapter of a module; None if it has none."""
    from peft.tuners.lora import LoraLayer

    return LayerAdapter(module) if isinstance(module, LoraLayer) else None


def merged_view(state: dict[str, torch.Tensor], model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Adapter]]:
    """Return the state dict under the names of the model without adapters, and the adapters by name of the weight."""
    state = dict(state)
    adapters: dict[str, Adapter] = {}
    for name, layer in _lora_layers(model):
        a, b = state.pop(_state_key(name, "A")), state.pop(_state_key(name, "B"))
        adapters[f"{name}.weight"] = Adapter(a.detach(), b.detach(), layer.scaling[_NAME])
    wrapped = tuple(name.removesuffix(".weight") + ".base_layer." for name in adapters)
    plain = {
        name.replace(".base_layer.", ".") if name.startswith(wrapped) else name: value for name, value in state.items()
    }
    return plain, adapters


def gather_adapter(model: nn.Module, device: torch.device, *, keep: bool) -> dict[str, torch.Tensor]:
    """Return the adapters' full tensors on the CPU, by their names in adapter_model.safetensors. Collective.

    Args:
        device: device of collectives.
        keep: False on the ranks that do not write them; they return no tensors.
    """
    tensors = {}
    for name, layer in _lora_layers(model):
        for part, parameter in (("A", layer.lora_A[_NAME].weight), ("B", layer.lora_B[_NAME].weight)):
            tensor = to_device(parameter.detach(), device)
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if keep:
                tensors[_file_key(name, part)] = full.cpu().contiguous()
    return tensors


def write_adapter(model: nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, float32, in the format of `PeftModel.from_pretrained`.

    Args:
        tensors: the result of `gather_adapter`.
    """
    path.mkdir(parents=True, exist_ok=True)
    save_safetensors(tensors, path / _WEIGHTS_FILE)
    _peft_config(model).save_pretrained(str(path))


def check_same_scale(model: nn.Module, path: Path) -> None:
    """Check that the adapters saved in `path` have the same scale as the model's adapters.

    Raises:
        ValueError: rank or alpha differ.
    """
    from peft import LoraConfig

    saved, ours = LoraConfig.from_pretrained(str(path)), _peft_config(model)
    keys = {"r": "lora_rank", "lora_alpha": "lora_alpha"}
    for field in (*keys, "use_rslora", "rank_pattern", "alpha_pattern"):
        theirs, here = getattr(saved, field), getattr(ours, field)
        if theirs != here:
            name = f"actor_rollout_ref.model.{keys[field]}" if field in keys else field
            fix = f"set {keys[field]}={theirs}" if field in keys else "set lora_adapter_path to that of the saved run"
            raise ValueError(
                f"{name}={here}: {path} was saved with {theirs}; {fix} to resume, or start a new run "
                "(trainer.resume_mode=disable)"
            )


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Iterate over name and module of every layer with an adapter."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _peft_config(model: nn.Module) -> Any:
    return model.peft_config[_NAME]  # type: ignore[index]  # nn.Module types every attribute as a tensor or module


def _state_key(name: str, part: str) -> str:
    return f"{name}.lora_{part}.{_NAME}.weight"


def _file_key(name: str, part: str) -> str:
    return f"base_model.model.{name}.lora_{part}.weight"


@torch.no_grad()
def _initialize(layers: dict[str, Any]) -> None:
    """Set A as peft does (Kaiming-uniform with a = sqrt(5)) and B to zero."""
    generator = torch.Generator().manual_seed(torch.initial_seed())
    for layer in layers.values():
        a, b = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
        drawn = torch.empty(a.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        a.copy_(drawn)
        b.zero_()


@torch.no_grad()
def _read_adapter(layers: dict[str, Any], path: Path) -> None:
    """Copy the adapter in directory `path` into the layers.

    Raises:
        ValueError: a layer is missing, has another shape, or is unknown to the model.
    """
    key = f"actor_rollout_ref.model.lora_adapter_path={path}"
    saved = load_file(path / _WEIGHTS_FILE)
    for name, layer in layers.items():
        for part, parameter in (("A", layer.lora_A[_NAME].weight), ("B", layer.lora_B[_NAME].weight)):
            tensor = saved.pop(_file_key(name, part), None)
            if tensor is None or tensor.shape != parameter.shape:
                found = "is missing" if tensor is None else f"has shape {list(tensor.shape)}"
                raise ValueError(
                    f"{key}: lora_{part} of {name} {found}, expected shape {list(parameter.shape)}; use an adapter "
                    "that was trained on this model"
                )
            parameter.copy_(tensor)
    if saved:
        raise ValueError(
            f"{key}: {min(saved)} does not belong to any layer; use an adapter that was trained on this model"
        )


def _log_sizes(model: nn.Module, options: LoraOptions, layers: int) -> None:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    source = options.adapter_path or "new"
    logger.info(
        "LoRA, rank %d, on %d layers (%s): %d trained parameters, %d frozen parameters",
        options.rank,
        layers,
        source,
        trained,
        frozen,
    )
