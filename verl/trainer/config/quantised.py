"""A quantised rollout as the checks plan it: from names and shapes, without torch and without an engine."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from verl.trainer.config.model_files import ModelFiles
from verl.trainer.config.rollout import RolloutConfig
from verl.utils.vllm.ascend_description import AscendDescription, resolve_description
from verl.utils.vllm.ascend_layers import Layer
from verl.utils.vllm.ascend_release import NEWEST_READ, refuse_unpaired_groups
from verl.utils.vllm.checkpoint_index import CheckpointIndex, has_weights, read_checkpoint_index
from verl.utils.vllm.config_shapes import index_of_config
from verl.utils.vllm.quantised_weights import (
    FP8_BLOCK,
    fp8_layers,
    fp8_summary,
    refuse_config_file,
    refuse_description,
    refuse_device,
    refuse_dtype,
    refuse_fused_experts,
    refuse_load_format,
    refuse_uncuttable_fp8,
)


@dataclass(frozen=True)
class PlannedQuantisation:
    """What a scheme would say.

    Attributes:
        text: how the engine holds the weights.
        quantised_bytes: of the quantised weights, scales included; None where the engine quantises by itself.
        plain_elements: of the weights that are not.
        sent_quantised: what travels is quantised already.
    """

    text: str
    quantised_bytes: int | None
    plain_elements: int
    sent_quantised: bool

    def summary(self) -> str:
        return self.text

    def engine_bytes(self, itemsize: int) -> int | None:
        """Of all weights in the engine, those that are not quantised in `itemsize` bytes an element."""
        return None if self.quantised_bytes is None else self.quantised_bytes + self.plain_elements * itemsize

    def update_bytes(self, itemsize: int) -> int | None:
        """As `QuantizationScheme.update_bytes`."""
        return self.engine_bytes(itemsize) if self.sent_quantised else None


def plan_quantisation(rollout: RolloutConfig, model: ModelFiles, device: str) -> PlannedQuantisation | None:
    """What the scheme of `rollout.quantization` would start an engine with; None where the files do not tell.

    Raises:
        ValueError, NotImplementedError: as the scheme's `engine_overrides`, but for what an installation lacks.
    """
    name = rollout.quantization
    if name is None:
        refuse_description(model.path, device)
        return None
    refuse_device(name, device)
    if name == "torchao":
        return _torchao(rollout)
    refuse_load_format(name, rollout.load_format)
    if device == "npu" or name == "fp8":
        refuse_dtype(name, rollout.dtype, device)
    if model.parameters is None:
        return None
    index = _index(model)
    sent = rollout.quantization_side == "sender"
    if name == "fp8":
        return _fp8(index, rollout, sent)
    description = resolve_description(
        model.path, rollout.quantization_config_file, rollout.tensor_model_parallel_size, index=index
    )
    refuse_fused_experts(description.layers)
    if device == "npu":
        refuse_unpaired_groups(description.layers, rollout.tensor_model_parallel_size, NEWEST_READ)
    return _ascend(description, sent)


def _ascend(description: AscendDescription, sent: bool) -> PlannedQuantisation:
    quantised = sum(layer.nbytes_after for layer in description.layers if layer.quantised)
    return PlannedQuantisation(f"MXFP8: {description.summary()}", quantised, _plain(description.layers), sent)


def _fp8(index: CheckpointIndex, rollout: RolloutConfig, sent: bool) -> PlannedQuantisation:
    refuse_config_file("fp8", rollout.quantization_config_file)
    layers = fp8_layers(index).values()
    refuse_fused_experts(layers)
    for layer in layers:
        refuse_uncuttable_fp8(layer, rollout.tensor_model_parallel_size)
    quantised = 0
    for layer in layers:
        if layer.quantised:
            *_, n, k = layer.info.shape
            quantised += n * k + 4 * math.ceil(n / FP8_BLOCK) * math.ceil(k / FP8_BLOCK)
    return PlannedQuantisation(fp8_summary(layers), quantised, _plain(layers), sent)


def _torchao(rollout: RolloutConfig) -> PlannedQuantisation:
    file = rollout.quantization_config_file
    refuse_config_file("torchao", file)
    return PlannedQuantisation(f"torchao, as {file} says; the engine quantises", None, 0, False)


def _plain(layers: Iterable[Layer]) -> int:
    return sum(math.prod(layer.info.shape) for layer in layers if not layer.quantised)


def _index(model: ModelFiles) -> CheckpointIndex:
    if model.path.is_dir() and has_weights(model.path):
        return read_checkpoint_index(model.path)
    return index_of_config(Path(model.path), model.config)
