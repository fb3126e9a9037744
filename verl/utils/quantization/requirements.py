"""What a quantization of the rollout asks of device and checkpoint. Torch-free, unlike the schemes that ask it too."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from verl.utils.dtypes import choose_dtype
from verl.utils.model_dir.index import CheckpointIndex
from verl.utils.quantization.ascend_description import DESCRIPTION_FILE
from verl.utils.quantization.ascend_layers import COLUMN, ROW, Layer, read_layers

FP8_BLOCK = 128
_FIELD = "actor_rollout_ref.rollout.quantization"


def validate_device(quantization: str, device: str) -> None:
    """Refuse a device that has no kernels for it; ValueError naming what to use there."""
    if quantization == "ascend" and device not in ("cpu", "npu"):
        raise ValueError(
            f"{_FIELD}=ascend: runs on an Ascend NPU and, emulated, on a CPU, not on {device}; use fp8 there"
        )
    if quantization != "ascend" and device == "npu":
        raise ValueError(f"{_FIELD}={quantization}: not on an Ascend NPU; use ascend there")


def validate_config_file(quantization: str, file: str | None) -> None:
    """Refuse a `rollout.quantization_config_file` that fp8 cannot heed, and one that torchao lacks."""
    if quantization == "fp8" and file is not None:
        raise NotImplementedError(f"{_FIELD}_config_file={file} is not supported yet with quantization=fp8: use null")
    if quantization == "torchao" and file is None:
        raise ValueError(
            f"{_FIELD}=torchao needs {_FIELD}_config_file: the JSON that torchao.core.config.config_to_dict gives, for "
            'example {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}'
        )


def validate_load_format(quantization: str, load_format: str) -> None:
    """Refuse an engine that would read the checkpoint itself, which holds nothing in e4m3, and no scales."""
    if load_format != "dummy":
        raise ValueError(
            f"actor_rollout_ref.rollout.load_format={load_format}: with quantization={quantization} the engine's first "
            "weights come from the trainer; use dummy"
        )


def validate_dtype(quantization: str, dtype: str, device: str) -> None:
    """Refuse an engine that computes in float32, for a method whose kernels take bfloat16."""
    chosen = choose_dtype(device, dtype)
    if chosen.name != "bfloat16":
        raise ValueError(
            f"actor_rollout_ref.rollout.dtype={dtype}: the engine would compute in {chosen.name} ({chosen.why}), and "
            f"quantization={quantization} on {device} needs bfloat16; set actor_rollout_ref.rollout.dtype=bfloat16"
        )


def validate_description(model_dir: str | Path, device: str) -> None:
    """Refuse a description in the directory of a model that is not to be quantized."""
    description = Path(model_dir) / DESCRIPTION_FILE
    if device == "npu" and description.exists():
        raise ValueError(
            f"{_FIELD}=null: vllm-ascend takes {description} for the wish to quantize all the same; set "
            "quantization=ascend, or move that file away"
        )


def validate_fused_experts(layers: Iterable[Layer]) -> None:
    """Refuse checkpoints that hold a layer's experts in one tensor: how gate and up lie in it differs by model."""
    for layer in layers:
        if layer.quantized and len(layer.info.shape) == 3:
            raise NotImplementedError(
                f"{layer.name} {list(layer.info.shape)}: experts in one tensor are not supported yet in a quantized "
                "rollout; use a checkpoint with one tensor an expert, or leave the layer out"
            )


def fp8_layers(index: CheckpointIndex) -> dict[str, Layer]:
    """By tensor: the weights of a checkpoint, the projections of the decoder among them quantized by `fp8`.

    Raises:
        ValueError: it is quantized already, or as `read_layers`.
    """
    if index.config.get("quantization_config") or index.text_config.get("quantization_config"):
        raise ValueError(
            f"{_FIELD}=fp8: the checkpoint {index.model_dir} is already quantized: weights are quantized while they "
            "are sent; use the BF16 checkpoint"
        )
    return {layer.parameter: layer for layer in read_layers(index)}


def fp8_summary(layers: Iterable[Layer]) -> str:
    """How many weights `fp8` quantizes, in one line."""
    flags = [layer.quantized for layer in layers]
    return f"float8 in blocks of {FP8_BLOCK} x {FP8_BLOCK}: {sum(flags)} of {len(flags)} weights"


def validate_uncuttable_fp8(layer: Layer, tp_size: int) -> None:
    """Blocks must end where vLLM cuts a layer, or where it packs one after another; else ValueError naming both."""
    if not layer.quantized:
        return
    *_, n, k = layer.info.shape
    if layer.split == ROW and tp_size > 1 and k % (FP8_BLOCK * tp_size):
        raise ValueError(
            f"{_FIELD}=fp8: {layer.name} {[n, k]} has {k} inputs, which blocks of {FP8_BLOCK} do not divide among "
            f"tensor_model_parallel_size={tp_size}; use a smaller tensor_model_parallel_size"
        )
    if layer.split == COLUMN and (tp_size > 1 or layer.packed_with) and n % (FP8_BLOCK * tp_size):
        raise ValueError(
            f"{_FIELD}=fp8: {layer.name} {[n, k]} has {n} outputs, which blocks of {FP8_BLOCK} do not divide "
            f"(tensor_model_parallel_size={tp_size}); use quantization=null"
        )
