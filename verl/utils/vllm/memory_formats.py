"""Memory formats of the parameters of vllm-ascend's layers.

Elements can only be written through a view if they are in memory where the strides say. An NPU can hold a tensor in
another format (FRACTAL_NZ), and vllm-ascend 0.28 and later does so by default. No operation raises then, so the formats
are read before and after each update.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import nn

# torch_npu's numbers of the formats with strided memory: NCHW, ND, NCDHW. A new tensor has the one of its dimensions.
_STRIDED_FORMATS = (0, 2, 30)
_FORMAT_NAMES = {3: "NC1HWC0", 4: "FRACTAL_Z", 29: "FRACTAL_NZ", 50: "FRACTAL_NZ_C0_16", 51: "FRACTAL_NZ_C0_32"}
MXFP8_SCHEMES = {"AscendW8A8MXFP8DynamicLinearMethod", "AscendW8A8MXFP8DynamicFusedMoEMethod"}
MXFP4_SCHEMES = {"AscendW4A8MXFPDynamicLinearMethod", "AscendW4A8MXFPDynamicFusedMoEMethod"}


def ascend_scheme(layer: nn.Module) -> Any:
    """Return the scheme that vllm-ascend stores in a layer's quantization method; None for other layers."""
    return getattr(getattr(layer, "quant_method", None), "quant_method", None)


def memory_format(layer: nn.Module, tensor: torch.Tensor) -> int | None:
    """Return torch_npu's number of the format of a tensor of an MXFP4 layer; None if vllm-ascend did not make it."""
    if type(ascend_scheme(layer)).__name__ not in MXFP4_SCHEMES:
        return None
    return int(import_module("torch_npu").get_npu_format(tensor))


def format_name(number: int | None) -> str:
    """Return a format for an error message."""
    return f"{_FORMAT_NAMES.get(number or 0, 'unknown')} ({number})"


def check_memory_formats(model: nn.Module) -> None:
    """Check that the memory of each parameter has a strided format, if vllm-ascend made quantized layers of the model.

    Weights in MXFP4 are excepted: they are replaced as a whole.

    Raises:
        RuntimeError: a parameter has another format; names it, the format and the setting that avoids it.
    """
    ascend = [
        layer for layer in model.modules() if type(ascend_scheme(layer)).__name__ in MXFP8_SCHEMES | MXFP4_SCHEMES
    ]
    if not ascend:
        return
    format_of = import_module("torch_npu").get_npu_format
    device = next(ascend[0].parameters()).device.type
    for name, layer in model.named_modules():
        mxfp4 = type(ascend_scheme(layer)).__name__ in MXFP4_SCHEMES
        for key, parameter in layer._parameters.items():
            if parameter is None or parameter.device.type != device or (mxfp4 and key.endswith("weight")):
                continue
            if (found := int(format_of(parameter.data))) in _STRIDED_FORMATS:
                continue
            raise RuntimeError(
                f"{name}.{key}: its memory format is {format_name(found)}, expected ND (2): an update would corrupt "
                "the weights; start the engine with actor_rollout_ref.rollout.engine_kwargs.vllm."
                "additional_config.weight_nz_mode=0, or with VLLM_ASCEND_ENABLE_NZ=0 for vllm-ascend before 0.27"
            )
