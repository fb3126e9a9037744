"""Checks that weights in e4m3 and their scales come together: what `ascend` and `fp8` have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from verl.utils.vllm.ascend_layers import Layer
from verl.workers.rollout.weight_sync.manifest import TensorSpec, WeightUpdateError

_VALUES = "float8_e4m3fn"


def refuse_non_finite(name: str, tensor: torch.Tensor) -> None:
    """Refuse to send a weight for what `tensor`, itself or its scales, holds."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise WeightUpdateError(f"parameter {name!r} holds NaN or Inf: the training diverged; nothing more was sent")


def refuse_fused_experts(layers: Iterable[Layer]) -> None:
    """Refuse checkpoints that hold a layer's experts in one tensor: how gate and up lie in it differs by model."""
    for layer in layers:
        if layer.quantised and len(layer.info.shape) == 3:
            raise NotImplementedError(
                f"{layer.name} {list(layer.info.shape)}: experts in one tensor are not supported yet in a quantised "
                "rollout; use a checkpoint with one tensor an expert, or leave the layer out"
            )


@dataclass(frozen=True)
class ScaledWeights:
    """One kind of quantised weight.

    Attributes:
        suffix: what a scale's name adds to its weight's.
        dtype: torch dtype name of the scales.
        scale_shape: shape of the scales of a weight, by the weight's shape.
    """

    suffix: str
    dtype: str
    scale_shape: Callable[[tuple[int, ...]], tuple[int, ...]]

    def weight_of(self, name: str) -> str | None:
        """The weight that a tensor holds the scales of; None for any other tensor."""
        return name.removesuffix(self.suffix) if name.endswith(f"weight{self.suffix}") else None

    def check_pair(self, name: str, specs: Mapping[str, TensorSpec]) -> None:
        """Refuse `name` if what it belongs to has come too and does not fit."""
        weight_name = self.weight_of(name)
        if weight_name is not None and specs[name].dtype != self.dtype:
            raise WeightUpdateError(f"parameter {name!r}: scales are {self.dtype}, it is {specs[name].dtype}")
        weight = specs.get(weight_name or name)
        scale = specs.get(f"{weight_name or name}{self.suffix}")
        if weight is None or scale is None:
            return
        if weight.dtype != _VALUES:
            raise WeightUpdateError(f"parameter {weight.name!r}: {weight.dtype} with scales; it should be {_VALUES}")
        expected = self.scale_shape(weight.shape)
        if scale.shape != expected:
            raise WeightUpdateError(
                f"parameter {scale.name!r}: scales of shape {list(scale.shape)}, a weight of shape "
                f"{list(weight.shape)} has {list(expected)}: were they left padded?"
            )

    def check_complete(self, specs: Mapping[str, TensorSpec]) -> None:
        """Refuse weights without their scales and scales without their weight."""
        for name, spec in specs.items():
            weight_name = self.weight_of(name)
            if spec.dtype == _VALUES and f"{name}{self.suffix}" not in specs:
                raise WeightUpdateError(f"parameter {name!r}: its scales ({name}{self.suffix}) did not arrive")
            if weight_name is not None and weight_name not in specs:
                raise WeightUpdateError(f"parameter {name!r}: its weight ({weight_name}) did not arrive")
