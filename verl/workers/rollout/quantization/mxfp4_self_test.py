"""Self-test of an engine's MXFP4 layers at its start: known weights through the hooks of `mxfp4_layers`.

As `mxfp8_self_test`, for one layer of each class: two loads of known bytes, their kernel layout and addresses after
each, and a product after the second. On an NPU this also tests the casts to NZ format and back, and the copy from NZ to
NZ. It runs before the first update, so the layers hold the random weights of a start, which are not put back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn

from verl.utils.quantization.ascend_releases import NEWEST_TESTED
from verl.utils.quantization.formats import MX_BLOCK_SIZE
from verl.utils.quantization.mxfp4 import PACKED
from verl.utils.vllm.memory_formats import memory_format
from verl.workers.rollout.quantization.mxfp4_layers import (
    MXFP4Layer,
    apply_mxfp4_transformation_after_loading,
    mxfp4_layers,
    restore_mxfp4_weights_for_loading,
)
from verl.workers.rollout.quantization.mxfp8_self_test import (
    ANY_SCALE,
    LOADS,
    MODERATE_SCALE,
    OUTPUTS,
    PERIOD,
    TOKENS,
    KnownBytes,
    compare,
    exact_inputs,
    spread,
)
from verl.workers.rollout.quantization.npu_experts import experts_output

logger = logging.getLogger(__name__)

_SCALE = "_scale"
_ND = 2
_E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
_ANY_BYTE = tuple(range(256))
# For the first product of experts: pairs of 1, 2 and 4, times 2^5 or 2^6. The product is a power of two then.
_POWERS_OF_TWO, _SMALL_POWERS = tuple(low + 16 * high for low in (2, 4, 6) for high in (2, 4, 6)), (132, 133)


def run_mxfp4_self_test(model: nn.Module, vllm_config: Any, release: str) -> None:
    """Test one MXFP4 layer of each class; see the module.

    Args:
        model: the engine's model, after its first load and before the first update.
        vllm_config: the engine's `VllmConfig`.
        release: what made the layers, for messages: "vllm-ascend 0.30.0rc2".

    Raises:
        RuntimeError: the first difference: layer, release, parameter, and what differs.
    """
    started, tested = time.perf_counter(), _one_of_each_class(mxfp4_layers(model))
    for name, layer in tested.items():
        try:
            _test(layer, vllm_config)
        except Exception as error:
            raise RuntimeError(
                f"the MXFP4 self-test failed in {name} with {release}: {error}. The engine would generate from other "
                f"weights than those it is sent; use another release (the newest tested one is {NEWEST_TESTED}), or "
                "W8A8_MXFP8"
            ) from error
    logger.info("MXFP4 self-test: %d layers in %.2f s", len(tested), time.perf_counter() - started)


def _one_of_each_class(layers: Mapping[str, MXFP4Layer]) -> dict[str, MXFP4Layer]:
    """Return the smallest layer of each class, by name."""
    found: dict[type, str] = {}
    sizes = {name: sum(p.numel() for p in layer.parameters()) for name, layer in layers.items()}
    for name in sorted(layers, key=lambda name: sizes[name]):
        found.setdefault(type(layers[name]), name)
    return {name: layers[name] for name in found.values()}


def _known_weights(layer: MXFP4Layer, load: int) -> dict[str, KnownBytes]:
    """Return the bytes of each parameter for load 0 or 1."""
    known = {}
    for number, (key, shape) in enumerate(layer._mxfp4_original_shapes.items()):
        is_scale = key.endswith(_SCALE)
        if load == 0:
            values = ANY_SCALE if is_scale else _ANY_BYTE
        elif key.startswith("w13"):
            values = _SMALL_POWERS if is_scale else _POWERS_OF_TWO
        else:
            values = MODERATE_SCALE if is_scale else _ANY_BYTE
        generator = torch.Generator().manual_seed(100 * load + number)
        choice = torch.randint(len(values), (PERIOD,), generator=generator)
        known[key] = KnownBytes(tuple(shape), torch.tensor(values, dtype=torch.uint8)[choice])
    return known


def _values(known: Mapping[str, KnownBytes], key: str, *indices: torch.Tensor | int) -> torch.Tensor:
    """Return the float64 values of a weight's elements; the last index is that of the input."""
    inputs = torch.as_tensor(indices[-1])
    pairs = known[key].at(*indices[:-1], inputs // PACKED).int()
    codes = torch.where(inputs % PACKED == 0, pairs & 15, pairs >> 4)
    magnitude = torch.tensor(_E2M1, dtype=torch.float64)[codes & 7]
    scale = known[key + _SCALE].at(*indices[:-1], inputs // MX_BLOCK_SIZE).int()
    return torch.ldexp(torch.where(codes >= 8, -magnitude, magnitude), scale - 127)


def _test(layer: MXFP4Layer, vllm_config: Any) -> None:
    before = _addresses(layer)
    for load in range(LOADS):
        known = _known_weights(layer, load)
        restore_mxfp4_weights_for_loading(layer)
        for key, weights in known.items():
            target = getattr(layer, key).data
            for index, rows, values in weights.parts(target.device):
                target[(*index, rows)].copy_(values)
        apply_mxfp4_transformation_after_loading(layer)
        _check_kernel_layout(layer, known, load)
        if (after := _addresses(layer)) != before:
            raise RuntimeError(
                f"parameters moved in load {load + 1}: addresses, shapes and strides were {before}, now {after}; "
                "captured graphs would read the old memory"
            )
    if len(known) == 2:
        _check_product(layer, known, vllm_config.model_config.dtype)
    else:
        _check_experts(layer, known, vllm_config)


def _addresses(layer: MXFP4Layer) -> dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]]:
    data = {key: getattr(layer, key).data for key in layer._mxfp4_original_shapes}
    return {key: (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) for key, tensor in data.items()}


def _check_kernel_layout(layer: MXFP4Layer, known: Mapping[str, KnownBytes], load: int) -> None:
    """Compare the kernel layout with the known bytes: weight [K / 2, N], cast back from NZ format; scales in pairs."""
    for key, weights in known.items():
        kernel = getattr(layer, key).data
        if key.endswith(_SCALE):
            rows_first = kernel.transpose(-2, -3).flatten(-2)
        else:
            rows_first = kernel.transpose(-1, -2)
            if memory_format(layer, kernel) is not None:
                rows_first = import_module("torch_npu").npu_format_cast(rows_first, _ND)
        wrong = torch.zeros((), dtype=torch.int64, device=kernel.device)
        for index, rows, expected in weights.parts(kernel.device):
            wrong += torch.count_nonzero(rows_first[(*index, rows)] != expected)
        if wrong:
            raise RuntimeError(
                f"{key}: {int(wrong)} of {kernel.numel()} bytes of the kernel layout are not those that load "
                f"{load + 1} wrote"
            )


def _check_product(layer: Any, known: Mapping[str, KnownBytes], dtype: torch.dtype) -> None:
    """Compare the layer's product with that of the dequantized weight, for some of its outputs."""
    n, half = known["weight"].shape
    k = PACKED * half
    x, outputs = exact_inputs(k), spread(n, OUTPUTS)
    weight = _values(known, "weight", outputs[:, None], torch.arange(k))
    device = layer.weight_scale.device
    with torch.no_grad():
        product = layer.quant_method.apply(layer, x.to(device, dtype))
    compare("weight", product[:, outputs.to(device)], x @ weight.T, k * (x.abs() @ weight.abs().T))


def _check_experts(layer: Any, known: Mapping[str, KnownBytes], vllm_config: Any) -> None:
    """Compare the output of single experts; `mxfp8_self_test` explains the numbers.

    vllm-ascend rounds the first product to bfloat16, which holds powers of two exactly.
    """
    activation, experts = layer.activation, known["w13_weight"].shape[0]
    one_rank = getattr(layer, "expert_map", None) is None
    if getattr(activation, "value", activation) != "silu" or getattr(layer, "swiglu_limit", None) or not one_rank:
        logger.info("the MXFP4 self-test compares no product of experts other than silu experts of one rank")
        return
    (_, n, half), (_, hidden, inner_half) = known["w13_weight"].shape, known["w2_weight"].shape
    k, inner = PACKED * half, PACKED * inner_half
    expert = spread(experts, TOKENS).repeat_interleave(2)
    position = torch.tensor([0, k - 1]).repeat(len(expert) // 2)
    x = torch.zeros(len(expert), k).scatter_(1, position[:, None], 1.0)
    logits = torch.zeros(len(expert), experts).scatter_(1, expert[:, None], 256.0)  # exp(-256) is 0
    gate, up = _values(known, "w13_weight", expert[:, None], torch.arange(n), position[:, None]).chunk(2, dim=1)
    outputs = spread(hidden, OUTPUTS)
    w2 = _values(known, "w2_weight", expert[:, None, None], outputs[:, None], torch.arange(inner))
    terms = (gate / (1 + torch.exp(-gate)) * up)[:, None] * w2
    device, dtype = layer.w13_weight.device, vllm_config.model_config.dtype
    product = experts_output(layer, vllm_config, x.to(device, dtype), logits.to(device, dtype))
    compare("w13_weight and w2_weight", product[:, outputs.to(device)], terms.sum(-1), inner * terms.abs().sum(-1))
