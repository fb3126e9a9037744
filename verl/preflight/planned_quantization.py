"""A quantized rollout as the checks plan it: from names and shapes, without torch and without an engine."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from verl.config.rollout import RolloutConfig
from verl.utils.model_dir.index import CheckpointIndex, has_weights, read_checkpoint_index
from verl.utils.model_dir.model_files import ModelFiles
from verl.utils.model_dir.shapes_from_config import index_of_config
from verl.utils.quantization.ascend_description import AscendDescription, resolve_description
from verl.utils.quantization.ascend_layers import Layer
from verl.utils.quantization.ascend_releases import NEWEST_READ, validate_unpaired_groups
from verl.utils.quantization.requirements import (
    FP8_BLOCK,
    fp8_layers,
    fp8_summary,
    validate_config_file,
    validate_description,
    validate_device,
    validate_dtype,
    validate_fused_experts,
    validate_load_format,
    validate_uncuttable_fp8,
)


@dataclass(frozen=True)
class PlannedQuantization:
    """What a scheme would say.

    Attributes:
        text: how the engine holds the weights.
        quantized_bytes: of the quantized weights, scales included; None where the engine quantizes by itself.
        plain_elements: of the weights that are not.
        sent_quantized: what travels is quantized already.
    """

    text: str
    quantized_bytes: int | None
    plain_elements: int
    sent_quantized: bool

    def summary(self) -> str:
        return self.text

    def engine_bytes(self, itemsize: int) -> int | None:
        """Of all weights in the engine, those that are not quantized in `itemsize` bytes an element."""
        return None if self.quantized_bytes is None else self.quantized_bytes + self.plain_elements * itemsize

    def update_bytes(self, itemsize: int) -> int | None:
        """As `QuantizationScheme.update_bytes`."""
        return self.engine_bytes(itemsize) if self.sent_quantized else None


def plan_quantization(rollout: RolloutConfig, model: ModelFiles, device: str) -> PlannedQuantization | None:
    """What the scheme of `rollout.quantization` would start an engine with; None where the files do not tell.

    Raises:
        ValueError, NotImplementedError: as the scheme's `engine_overrides`, but for what an installation lacks.
    """
    name = rollout.quantization
    if name is None:
        validate_description(model.path, device)
        return None
    validate_device(name, device)
    if name == "torchao":
        return _torchao(rollout)
    validate_load_format(name, rollout.load_format)
    if device == "npu" or name == "fp8":
        validate_dtype(name, rollout.dtype, device)
    if model.parameters is None:
        return None
    index = _index(model)
    sent = rollout.quantization_side == "sender"
    if name == "fp8":
        return _fp8(index, rollout, sent)
    description = resolve_description(
        model.path, rollout.quantization_config_file, rollout.tensor_model_parallel_size, index=index
    )
    validate_fused_experts(description.layers)
    if device == "npu":
        validate_unpaired_groups(description.layers, rollout.tensor_model_parallel_size, NEWEST_READ)
    return _ascend(description, sent)


def _ascend(description: AscendDescription, sent: bool) -> PlannedQuantization:
    quantized = sum(layer.nbytes_after for layer in description.layers if layer.quantized)
    return PlannedQuantization(f"MXFP8: {description.summary()}", quantized, _plain(description.layers), sent)


def _fp8(index: CheckpointIndex, rollout: RolloutConfig, sent: bool) -> PlannedQuantization:
    validate_config_file("fp8", rollout.quantization_config_file)
    layers = fp8_layers(index).values()
    validate_fused_experts(layers)
    for layer in layers:
        validate_uncuttable_fp8(layer, rollout.tensor_model_parallel_size)
    quantized = 0
    for layer in layers:
        if layer.quantized:
            *_, n, k = layer.info.shape
            quantized += n * k + 4 * math.ceil(n / FP8_BLOCK) * math.ceil(k / FP8_BLOCK)
    return PlannedQuantization(fp8_summary(layers), quantized, _plain(layers), sent)


def _torchao(rollout: RolloutConfig) -> PlannedQuantization:
    file = rollout.quantization_config_file
    validate_config_file("torchao", file)
    return PlannedQuantization(f"torchao, as {file} says; the engine quantizes", None, 0, False)


def _plain(layers: Iterable[Layer]) -> int:
    return sum(math.prod(layer.info.shape) for layer in layers if not layer.quantized)


def _index(model: ModelFiles) -> CheckpointIndex:
    if model.path.is_dir() and has_weights(model.path):
        return read_checkpoint_index(model.path)
    return index_of_config(Path(model.path), model.config)
