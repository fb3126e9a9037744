"""Self-test of an engine's MXFP8 layers at its start: known weights through the hooks of `vllm_fp8_utils`.

One layer of each kind is tested: of each class, with and without padding, with even, odd and partial groups. Known
bytes are loaded twice, the second time other ones. After each load the kernel layout must hold these bytes at the
previous addresses; after the second one, the layer's own product must be that of the dequantized weights. Then the
layer gets its weights back, also if the test fails.

Expected values come from the known bytes and from the definitions of the two layouts, not from the hooks. No step
communicates with other ranks, and large tensors are handled in parts, so that an engine needs little memory for it.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from verl.utils.quantization.ascend_releases import NEWEST_TESTED
from verl.utils.quantization.formats import MX_BLOCK_SIZE
from verl.utils.vllm.vllm_fp8_utils import (
    MXFP8Layer,
    apply_mxfp8_transformation_after_loading,
    mxfp8_layers,
    restore_mxfp8_weights_for_loading,
)
from verl.workers.rollout.quantization.npu_experts import experts_output

logger = logging.getLogger(__name__)

_SCALE = "_scale"
LOADS = 2
_CHUNK_BYTES = 1 << 21
# A prime: other distances than its multiples separate elements that a wrong order of rows or groups would exchange.
PERIOD = 65_521
TOKENS, OUTPUTS = 4, 64
# Float32 sums of products: 2^-24 for each addition, twice that for units that truncate.
_ADDITION = 2.0**-23

# Bytes of e4m3 without NaN. Scales of 2^-63 .. 2^63 for the first load, and of 2^-8 .. 2^7 for one with a product.
_ANY_CODE = tuple(code for code in range(256) if code & 127 != 127)
ANY_SCALE, MODERATE_SCALE = tuple(range(64, 191)), tuple(range(119, 135))
# For the first product of experts: 2^4 .. 2^7, times 2 or 4. See `_check_experts`.
_POWERS_OF_TWO, _SMALL_POWERS = (88, 96, 104, 112), (128, 129)


def run_self_test(model: nn.Module, vllm_config: Any, release: str) -> None:
    """Test one MXFP8 layer of each kind; see the module.

    Args:
        model: the engine's model, after its first load. Unchanged afterwards.
        vllm_config: the engine's `VllmConfig`.
        release: what made the layers, for messages: "vllm-ascend 0.30.0rc2".

    Raises:
        RuntimeError: the first difference: layer, release, parameter, and what differs.
    """
    started, tested = time.perf_counter(), _one_of_each_kind(mxfp8_layers(model))
    for name, layer in tested.items():
        try:
            _test(layer, vllm_config)
        except Exception as error:
            raise RuntimeError(
                f"the MXFP8 self-test failed in {name} with {release}: {str(error).lstrip('.')}. The engine would "
                "generate from other weights than those it is sent; use another release (the newest tested one is "
                f"{NEWEST_TESTED}), or actor_rollout_ref.rollout.quantization=null"
            ) from error
    logger.info("MXFP8 self-test: %d layers in %.2f s", len(tested), time.perf_counter() - started)


def _one_of_each_kind(layers: Mapping[str, MXFP8Layer]) -> dict[str, MXFP8Layer]:
    """Return the smallest layer of each kind, by name."""
    found: dict[tuple, str] = {}
    sizes = {
        name: sum(p.numel() for p in layer._parameters.values() if p is not None) for name, layer in layers.items()
    }
    for name in sorted(layers, key=lambda name: sizes[name]):
        found.setdefault(_kind(layers[name]), name)
    return {name: layers[name] for name in found.values()}


def _kind(layer: MXFP8Layer) -> tuple:
    shapes = layer._mxfp8_original_shapes
    inputs = [shape[-1] for key, shape in shapes.items() if not key.endswith(_SCALE)]
    groups = tuple((k % MX_BLOCK_SIZE > 0, -(-k // MX_BLOCK_SIZE) % 2) for k in inputs)
    return type(layer), tuple(shapes), groups, tuple(zeros > 0 for zeros in _padding(layer))


def _padding(layer: nn.Module) -> tuple[int, int]:
    """Return the numbers of zeros that vllm-ascend 0.28 puts before and after the inputs of a row-parallel layer."""
    return vars(layer).get("mxfp8_tp_padding", (0, 0))


@dataclass(frozen=True)
class KnownBytes:
    """Known bytes of a parameter in checkpoint layout, as a function of the index in the flattened tensor.

    Attributes:
        shape: shape of the parameter.
        bytes: uint8 [`PERIOD`] on the CPU, repeated until the tensor is full.
    """

    shape: tuple[int, ...]
    bytes: torch.Tensor

    def parts(self, device: torch.device) -> Iterator[tuple[tuple[int, ...], slice, torch.Tensor]]:
        """Return the tensor in parts: leading indices, rows, and their bytes [rows, last dimension]."""
        *lead, n, k = self.shape
        source, step = self.bytes.to(device), max(1, _CHUNK_BYTES // k)
        for number, index in enumerate(itertools.product(*map(range, lead))):
            for first in range(0, n, step):
                rows = slice(first, min(n, first + step))
                count, offset = (rows.stop - first) * k, (number * n + first) * k % PERIOD
                repeated = source.repeat(-(-(offset + count) // PERIOD))
                yield index, rows, repeated[offset : offset + count].view(-1, k)

    def at(self, *indices: torch.Tensor | int) -> torch.Tensor:
        """Return the elements at int64 indices, one tensor for each dimension, which broadcast against each other."""
        flat = torch.zeros((), dtype=torch.int64)
        for index, size in zip(indices, self.shape, strict=True):
            flat = flat * size + index
        return self.bytes[flat % PERIOD]


def _known_weights(layer: MXFP8Layer, load: int) -> dict[str, KnownBytes]:
    """Return the bytes of each parameter for load 0 or 1."""
    known = {}
    for number, (key, shape) in enumerate(layer._mxfp8_original_shapes.items()):
        is_scale = key.endswith(_SCALE)
        if load == 0:
            values = ANY_SCALE if is_scale else _ANY_CODE
        elif key.startswith("w13"):
            values = _SMALL_POWERS if is_scale else _POWERS_OF_TWO
        else:
            values = MODERATE_SCALE if is_scale else _ANY_CODE
        generator = torch.Generator().manual_seed(100 * load + number)
        choice = torch.randint(len(values), (PERIOD,), generator=generator)
        known[key] = KnownBytes(tuple(shape), torch.tensor(values, dtype=torch.uint8)[choice])
    return known


def _values(known: Mapping[str, KnownBytes], key: str, first: int, *indices: torch.Tensor | int) -> torch.Tensor:
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
    scale = known[key + _SCALE].at(*indices[:-1], (first + indices[-1]) // MX_BLOCK_SIZE).int()
    return torch.ldexp(torch.where(codes >= 128, -magnitude, magnitude), scale - 127)


def _test(layer: MXFP8Layer, vllm_config: Any) -> None:
    with _weights_put_back(layer):
        before = _addresses(layer)
        for load in range(LOADS):
            known = _known_weights(layer, load)
            restore_mxfp8_weights_for_loading(layer)
            for key, weights in known.items():
                target = getattr(layer, key).data
                for index, rows, values in weights.parts(target.device):
                    target[(*index, rows)].copy_(values.view(target.dtype))
            apply_mxfp8_transformation_after_loading(layer)
            _check_kernel_layout(layer, known, load)
            for key, address in _addresses(layer).items():
                if address != before[key]:
                    raise RuntimeError(
                        f"{key} moved in load {load + 1}: address, shape and strides were {before[key]}, now "
                        f"{address}; captured graphs would read the old memory"
                    )
        if len(known) == 2:
            _check_product(layer, known, vllm_config.model_config.dtype)
        else:
            _check_experts(layer, known, vllm_config)


def _addresses(layer: MXFP8Layer) -> dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]]:
    data = {key: getattr(layer, key).data for key in layer._mxfp8_original_shapes}
    return {key: (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) for key, tensor in data.items()}


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


def _check_kernel_layout(layer: MXFP8Layer, known: Mapping[str, KnownBytes], load: int) -> None:
    """Compare the kernel layout with the known bytes: weight [K, N], scales [ceil(G / 2), N, 2]; padding is zero."""
    before, _ = _padding(layer)
    for key, weights in known.items():
        kernel = _bytes(getattr(layer, key))
        wrong = torch.zeros((), dtype=torch.int64, device=kernel.device)
        for index, rows, expected in weights.parts(kernel.device):
            if key.endswith(_SCALE):
                groups = nn.functional.pad(expected, (0, expected.shape[-1] % 2))
                actual = kernel[index][:, rows].transpose(0, 1).flatten(1)
                wrong += torch.count_nonzero(actual != groups)
            else:
                actual = kernel[index][:, rows].T
                after = actual.shape[1] - before - expected.shape[1]
                wrong += torch.count_nonzero(actual != nn.functional.pad(expected, (before, after)))
        if wrong:
            raise RuntimeError(
                f"{key}: {int(wrong)} of {kernel.numel()} bytes of the kernel layout are not those that load "
                f"{load + 1} wrote"
            )


def spread(size: int, count: int) -> torch.Tensor:
    """Return up to `count` indices from 0 to size - 1, the first and the last included."""
    return torch.linspace(0, size - 1, min(size, count), dtype=torch.float64).long()


def exact_inputs(k: int) -> torch.Tensor:
    """Return inputs [`TOKENS`, k] of similar size, float64, which a round trip through MXFP8 does not change."""
    generator = torch.Generator().manual_seed(7)
    significand = 8 + torch.randint(7, (TOKENS, k), generator=generator).double()
    sign = 1 - 2 * torch.randint(2, (TOKENS, k), generator=generator)
    return sign * torch.ldexp(significand, -3 - torch.randint(4, (TOKENS, k), generator=generator))


def _check_product(layer: Any, known: Mapping[str, KnownBytes], dtype: torch.dtype) -> None:
    """Compare the layer's product with that of the dequantized weight, for some of its outputs.

    Inputs are e4m3 numbers of similar size, so quantizing them changes nothing. A sum of K exact products in float32
    differs by at most K 2^-24 times the sum of their magnitudes (Higham, Accuracy and Stability, 2002, section 3.1).
    """
    n, k = known["weight"].shape
    x, outputs = exact_inputs(k), spread(n, OUTPUTS)
    weight = _values(known, "weight", _padding(layer)[0], outputs[:, None], torch.arange(k))
    with torch.no_grad():
        product = layer.quant_method.apply(layer, x.to(layer.weight.device, dtype))
    compare("weight", product[:, outputs.to(product.device)], x @ weight.T, k * (x.abs() @ weight.abs().T))


def _check_experts(layer: Any, known: Mapping[str, KnownBytes], vllm_config: Any) -> None:
    """Compare the output of single experts with that of the dequantized weights, for some of its elements.

    A token is 1 at one position, so the first product is a column of w13: powers of two of at least 2^5. Then silu(g)
    is g in float32, and silu(g) * u is a power of two, which MXFP8 holds exactly. The output is a single sum.
    """
    activation, experts = layer.activation, known["w13_weight"].shape[0]
    one_rank = getattr(layer, "expert_map", None) is None
    if getattr(activation, "value", activation) != "silu" or getattr(layer, "swiglu_limit", None) or not one_rank:
        logger.info("the MXFP8 self-test compares no product of experts other than silu experts of one rank")
        return
    (_, n, k), (_, hidden, inner) = known["w13_weight"].shape, known["w2_weight"].shape
    expert = spread(experts, TOKENS).repeat_interleave(2)
    position = torch.tensor([0, k - 1]).repeat(len(expert) // 2)
    x = torch.zeros(len(expert), k).scatter_(1, position[:, None], 1.0)
    logits = torch.zeros(len(expert), experts).scatter_(1, expert[:, None], 256.0)  # exp(-256) is 0
    columns = _values(known, "w13_weight", 0, expert[:, None], torch.arange(n), position[:, None])
    gate, up = columns.chunk(2, dim=1)
    outputs = spread(hidden, OUTPUTS)
    w2 = _values(known, "w2_weight", 0, expert[:, None, None], outputs[:, None], torch.arange(inner))
    terms = (gate / (1 + torch.exp(-gate)) * up)[:, None] * w2
    device, dtype = layer.w13_weight.device, vllm_config.model_config.dtype
    product = experts_output(layer, vllm_config, x.to(device, dtype), logits.to(device, dtype))
    compare("w13_weight and w2_weight", product[:, outputs.to(device)], terms.sum(-1), inner * terms.abs().sum(-1))


def compare(what: str, product: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor) -> None:
    """Compare a product with a float64 reference.

    Args:
        magnitude: number of summands times the sum of their magnitudes.

    Raises:
        RuntimeError: an element differs by more than float32 sums and three roundings to the dtype of `product` allow.
    """
    found = product.double().cpu()
    error = (found - expected).abs()
    allowed = _ADDITION * magnitude + 2 * torch.finfo(product.dtype).eps * expected.abs()
    wrong = ~(error <= allowed)
    if wrong.any():
        worst = int((error / allowed).nan_to_num(torch.inf).argmax())
        raise RuntimeError(
            f"the product with {what} differs from that of the dequantized weights in {int(wrong.sum())} of "
            f"{wrong.numel()} elements, for example {found.flatten()[worst]:.6g} instead of "
            f"{expected.flatten()[worst]:.6g}, with a bound of {allowed.flatten()[worst]:.2g}"
        )
