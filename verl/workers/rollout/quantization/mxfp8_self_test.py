"""Self-test of an engine's MXFP8 layers at its start: known weights through the hooks of `vllm_fp8_utils`.

One layer of each kind is tested: of each class, with and without padding, with even, odd and partial groups. Known
bytes are loaded twice, the second time other ones. After each load the kernel layout must hold these bytes at the
previous addresses; after the second one, the layer's own product must be that of the dequantized weights. Then the
layer gets its weights back, also if the test fails.

Expected values come from the known bytes and from the definitions of the two layouts, not from the hooks. No step
communicates with other ranks, and large tensors are handled in parts, so that an engine needs little memory for it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from verl.utils.quantization.formats import MX_BLOCK_SIZE
from verl.utils.vllm.vllm_fp8_utils import (
    MXFP8Layer,
    apply_mxfp8_transformation_after_loading,
    mxfp8_layers,
    restore_mxfp8_weights_for_loading,
)
from verl.workers.rollout.quantization.self_test import (
    SCALE,
    ByteChoices,
    KnownBytes,
    check_products,
    load_known_weights,
    run_on_each_kind,
)

# Bytes of e4m3 without NaN. For the first product of experts: 2^4 .. 2^7, times 2 or 4.
_BYTES = ByteChoices(tuple(code for code in range(256) if code & 127 != 127), (88, 96, 104, 112), (128, 129))


def run_self_test(model: nn.Module, vllm_config: Any, release: str) -> None:
    """Test one MXFP8 layer of each kind; see the module.

    Args:
        model: the engine's model, after its first load. Unchanged afterwards.
        vllm_config: the engine's `VllmConfig`.
        release: what made the layers, for messages: "vllm-ascend 0.30.0rc2".

    Raises:
        RuntimeError: the first difference: layer, release, parameter, and what differs.
    """
    run_on_each_kind(
        mxfp8_layers(model),
        _kind,
        lambda layer: _test(layer, vllm_config),
        weight_format="MXFP8",
        release=release,
        alternative="actor_rollout_ref.rollout.quantization=null",
    )


def _kind(layer: MXFP8Layer) -> tuple:
    shapes = layer._mxfp8_original_shapes
    inputs = [shape[-1] for key, shape in shapes.items() if not key.endswith(SCALE)]
    groups = tuple((k % MX_BLOCK_SIZE > 0, -(-k // MX_BLOCK_SIZE) % 2) for k in inputs)
    return type(layer), tuple(shapes), groups, tuple(zeros > 0 for zeros in _padding(layer))


def _padding(layer: nn.Module) -> tuple[int, int]:
    """Return the numbers of zeros that vllm-ascend 0.28 puts before and after the inputs of a row-parallel layer."""
    return vars(layer).get("mxfp8_tp_padding", (0, 0))


def _values(known: Mapping[str, KnownBytes], first: int, key: str, *indices: torch.Tensor | int) -> torch.Tensor:
    """Return the float64 values of a weight's elements: e4m3 times a power of two for each group of 32 inputs.

    Args:
        first: position of the first input in its group.
        indices: as of `KnownBytes.at`; the last one is that of the input.
    """
    codes = known[key].at(*indices).int()
    exponent, mantissa = codes >> 3 & 15, (codes & 7).double()
    magnitude = torch.where(
        exponent > 0, torch.ldexp(1 + mantissa / 8, exponent - 7), torch.ldexp(mantissa / 8, torch.tensor(-6))
    )
    scale = known[key + SCALE].at(*indices[:-1], (first + indices[-1]) // MX_BLOCK_SIZE).int()
    return torch.ldexp(torch.where(codes >= 128, -magnitude, magnitude), scale - 127)


def _test(layer: MXFP8Layer, vllm_config: Any) -> None:
    with _weights_put_back(layer):
        known = load_known_weights(
            layer,
            layer._mxfp8_original_shapes,
            _BYTES,
            restore=restore_mxfp8_weights_for_loading,
            transform=apply_mxfp8_transformation_after_loading,
            count_wrong_bytes=functools.partial(_count_wrong_bytes, layer),
        )
        values = functools.partial(_values, known, _padding(layer)[0])
        check_products(layer, known, values, vllm_config, weight_format="MXFP8")


@contextmanager
def _weights_put_back(layer: MXFP8Layer) -> Iterator[None]:
    """Give a layer its parameters, their memory and their bytes back, also after an error.

    Raises:
        RuntimeError: the bytes differ afterwards.
    """
    saved = _save(layer)
    try:
        yield
    except Exception as error:
        if lost := _put_back(layer, saved):
            raise RuntimeError(f"{error}; besides, {lost}") from error
        raise
    if lost := _put_back(layer, saved):
        raise RuntimeError(lost)


_Saved = dict[str, tuple[nn.Parameter, torch.Tensor, torch.Tensor]]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.data.view(torch.uint8)


def _save(layer: MXFP8Layer) -> _Saved:
    """Return each parameter, its memory, and a copy of its bytes."""
    parameters = {key: getattr(layer, key) for key in layer._mxfp8_original_shapes}
    # The copy is on the host: the key-value cache has taken the memory of the device.
    return {
        key: (p, p.data, torch.empty_like(_bytes(p), device="cpu").copy_(_bytes(p))) for key, p in parameters.items()
    }


def _put_back(layer: MXFP8Layer, saved: _Saved) -> str | None:
    """Write saved parameters into their memory; return what is wrong afterwards."""
    for key, (parameter, data, values) in saved.items():
        layer._parameters[key] = parameter
        parameter.data = data
        _bytes(data).copy_(values)
    layer._mxfp8_transformed = True
    refresh = getattr(layer.quant_method, "refresh_after_loading", None)
    if refresh is not None:
        refresh(layer)
    for key, (_, data, values) in saved.items():
        if wrong := int(torch.count_nonzero(_bytes(data).cpu() != values)):
            return f"the layer did not get its weights back: {wrong} bytes of {key} differ"
    return None


def _count_wrong_bytes(layer: MXFP8Layer, key: str, known: KnownBytes) -> int:
    """Compare a kernel layout with known bytes: weight [K, N], scales [ceil(G / 2), N, 2]; padding is zero."""
    before, _ = _padding(layer)
    kernel = _bytes(getattr(layer, key))
    wrong = torch.zeros((), dtype=torch.int64, device=kernel.device)
    for index, rows, expected in known.parts(kernel.device):
        if key.endswith(SCALE):
            groups = nn.functional.pad(expected, (0, expected.shape[-1] % 2))
            actual = kernel[index][:, rows].transpose(0, 1).flatten(1)
            wrong += torch.count_nonzero(actual != groups)
        else:
            actual = kernel[index][:, rows].T
            after = actual.shape[1] - before - expected.shape[1]
            wrong += torch.count_nonzero(actual != nn.functional.pad(expected, (before, after)))
    return int(wrong)
