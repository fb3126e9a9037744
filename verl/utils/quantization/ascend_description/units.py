"""Layers that must have the same precision, as units of which each can be quantized or left out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from verl.utils.model_dir.index import CheckpointIndex
from verl.utils.quantization.ascend_description.build import select_layers
from verl.utils.quantization.ascend_description.description import AscendDescription
from verl.utils.quantization.ascend_description.validation import (
    validate_experts,
    validate_inputs,
    validated_description,
)
from verl.utils.quantization.ascend_layers import SENSITIVE, UNFIT, Layer, name_pattern
from verl.utils.quantization.ascend_releases import NEWEST_READ, validate_mxfp4, validate_paired_groups

# Bytes of an unquantized weight: engines with quantized layers compute in bfloat16.
ITEMSIZE = 2


@dataclass(frozen=True)
class PrecisionUnit:
    """Layers that the engine packs into one (q, k and v; gate and up; all experts of a layer), or a single layer.

    Attributes:
        name: name of the packed layers, such as `model.layers.0.self_attn.{q_proj,k_proj,v_proj}`, or of the layer.
        layers: the layers.
        saved: by scheme, the bytes that the engine saves if the layers are in it; schemes that do not fit are left out.
    """

    name: str
    layers: tuple[Layer, ...]
    saved: Mapping[str, int]

    @property
    def kind(self) -> str:
        """Its name, with `*` for the number of the decoder layer."""
        return name_pattern(self.name)

    @property
    def depth(self) -> int | None:
        """Number of its decoder layer; None if its name has no number."""
        found = re.search(r"(?<=\.)\d+(?=\.)", self.name)
        return int(found[0]) if found else None

    @property
    def weights(self) -> frozenset[str]:
        """Checkpoint names of its weights."""
        return frozenset(layer.parameter for layer in self.layers)


@dataclass(frozen=True)
class PrecisionUnits:
    """The units of a checkpoint.

    Attributes:
        index: names and shapes of the checkpoint.
        tp_size, expert_parallel: see `build_description`.
        layers: every weight of the checkpoint.
        units: in the order of the checkpoint; each has one scheme or more.
        unfit: name of the layers that no engine can hold in any of the schemes -> the reason.
    """

    index: CheckpointIndex
    tp_size: int
    expert_parallel: bool
    layers: Sequence[Layer]
    units: tuple[PrecisionUnit, ...]
    unfit: Mapping[str, str]

    @property
    def unquantized_nbytes(self) -> int:
        """Bytes of all tensors in an engine that quantizes no layer."""
        layers = tuple(replace(layer, reason=layer.reason or SENSITIVE) for layer in self.layers)
        return AscendDescription("", self.tp_size, layers, self.index.tensors).engine_bytes(ITEMSIZE)

    def describe(self, schemes: Mapping[str, str]) -> AscendDescription:
        """Return the description with some units quantized and all other layers not.

        Args:
            schemes: name of a unit -> its scheme.

        Raises:
            ValueError: `schemes` is empty, or vLLM cannot run the model with a description.
        """
        layers = []
        for layer in self.layers:
            name = layer.packed_with or layer.name
            if layer.quantized and name in schemes:
                layer = replace(layer, scheme=schemes[name])
            elif layer.quantized:
                layer = replace(layer, reason=UNFIT if name in self.unfit else SENSITIVE)
            layers.append(layer)
        return validated_description(self.index, layers, self.tp_size, self.expert_parallel, padded_shares=False)


def read_units(
    index: CheckpointIndex,
    schemes: Sequence[str],
    *,
    tp_size: int = 1,
    ignore: Iterable[str] = (),
    expert_parallel: bool = False,
) -> PrecisionUnits:
    """Group the projections of a checkpoint.

    Args:
        index: names and shapes of the checkpoint.
        schemes: formats to consider, such as W8A8_MXFP8.
        tp_size, ignore, expert_parallel: see `build_description`.

    Raises:
        ValueError: see `build_description`; no layer fits any of the schemes.
    """
    layers = select_layers(index, ignore)
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.quantized:
            groups.setdefault(layer.packed_with or layer.name, []).append(layer)
    units, unfit = [], {}
    for name, group in groups.items():
        saved = {}
        for scheme in schemes:
            described = [replace(layer, scheme=scheme) for layer in group]
            try:
                _validate(described, tp_size, expert_parallel)
            except (ValueError, NotImplementedError) as error:
                unfit[name] = str(error)
            else:
                before = sum(ITEMSIZE * math.prod(layer.info.shape) for layer in group)
                saved[scheme] = before - sum(layer.engine_nbytes for layer in described)
        if saved:
            unfit.pop(name, None)
            units.append(PrecisionUnit(name, tuple(group), saved))
    if unfit and not units:
        raise ValueError(next(iter(unfit.values())))
    found = PrecisionUnits(index, tp_size, expert_parallel, layers, tuple(units), unfit)
    found.describe({unit.name: next(iter(unit.saved)) for unit in units})
    return found


def _validate(layers: Sequence[Layer], tp_size: int, expert_parallel: bool) -> None:
    """Check that an engine can hold these layers, on a CPU and with the newest vllm-ascend."""
    validate_inputs(layers, tp_size, expert_parallel=expert_parallel, padded_shares=False)
    validate_experts(layers)
    validate_paired_groups(layers, tp_size, NEWEST_READ)
    validate_mxfp4(layers, tp_size, NEWEST_READ)
