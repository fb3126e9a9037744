"""Self-test of an engine's MXFP4 layers at its start: known weights through the hooks of `mxfp4_layers`.

As `mxfp8_self_test`, for one layer of each class: two loads of known bytes, their kernel layout and addresses after
each, and a product after the second. On an NPU this also tests the casts to NZ format and back, and the copy from NZ to
NZ. It runs before the first update, so the layers hold the random weights of a start, which are not put back.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn

from verl.utils.quantization.formats import MX_BLOCK_SIZE
from verl.utils.quantization.mxfp4 import PACKED
from verl.utils.vllm.memory_formats import memory_format
from verl.workers.rollout.quantization.mxfp4_layers import (
    MXFP4Layer,
    apply_mxfp4_transformation_after_loading,
    mxfp4_layers,
    restore_mxfp4_weights_for_loading,
)
from verl.workers.rollout.quantization.self_test import (
    SCALE,
    ByteChoices,
    KnownBytes,
    check_products,
    load_known_weights,
    run_on_each_kind,
)

_ND = 2
_E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
# For the first product of experts: pairs of 1, 2 and 4, times 2^5 or 2^6.
_BYTES = ByteChoices(tuple(range(256)), tuple(low + 16 * high for low in (2, 4, 6) for high in (2, 4, 6)), (132, 133))


def run_mxfp4_self_test(model: nn.Module, vllm_config: Any, release: str) -> None:
    """Test one MXFP4 layer of each class; see the module.

    Args:
        model: the engine's model, after its first load and before the first update.
        vllm_config: the engine's `VllmConfig`.
        release: what made the layers, for messages: "vllm-ascend 0.30.0rc2".

    Raises:
        RuntimeError: the first difference: layer, release, parameter, and what differs.
    """
    run_on_each_kind(
        mxfp4_layers(model),
        type,
        lambda layer: _test(layer, vllm_config),
        weight_format="MXFP4",
        release=release,
        alternative="W8A8_MXFP8",
    )


def _values(known: Mapping[str, KnownBytes], key: str, *indices: torch.Tensor | int) -> torch.Tensor:
    """Return the float64 values of a weight's elements; the last index is that of the input."""
    inputs = torch.as_tensor(indices[-1])
    pairs = known[key].at(*indices[:-1], inputs // PACKED).int()
    codes = torch.where(inputs % PACKED == 0, pairs & 15, pairs >> 4)
    magnitude = torch.tensor(_E2M1, dtype=torch.float64)[codes & 7]
    scale = known[key + SCALE].at(*indices[:-1], inputs // MX_BLOCK_SIZE).int()
    return torch.ldexp(torch.where(codes >= 8, -magnitude, magnitude), scale - 127)


def _test(layer: MXFP4Layer, vllm_config: Any) -> None:
    known = load_known_weights(
        layer,
        layer._mxfp4_original_shapes,
        _BYTES,
        restore=restore_mxfp4_weights_for_loading,
        transform=apply_mxfp4_transformation_after_loading,
        count_wrong_bytes=functools.partial(_count_wrong_bytes, layer),
    )
    check_products(layer, known, functools.partial(_values, known), vllm_config, weight_format="MXFP4", packed=PACKED)


def _count_wrong_bytes(layer: MXFP4Layer, key: str, known: KnownBytes) -> int:
    """Compare a kernel layout with known bytes: weight [K / 2, N], cast back from NZ format; scales in pairs."""
    kernel = getattr(layer, key).data
    if key.endswith(SCALE):
        rows_first = kernel.transpose(-2, -3).flatten(-2)
    else:
        rows_first = kernel.transpose(-1, -2)
        if memory_format(layer, kernel) is not None:
            rows_first = import_module("torch_npu").npu_format_cast(rows_first, _ND)
    wrong = torch.zeros((), dtype=torch.int64, device=kernel.device)
    for index, rows, expected in known.parts(kernel.device):
        wrong += torch.count_nonzero(rows_first[(*index, rows)] != expected)
    return int(wrong)
