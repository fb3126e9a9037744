"""Parts of the self-tests that MXFP8 and MXFP4 layers share: known bytes, loads, products, and the errors.

`mxfp8_self_test` and `mxfp4_self_test` add the two formats and their layouts.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from verl.utils.quantization.ascend_releases import NEWEST_TESTED
from verl.workers.rollout.quantization.npu_experts import experts_output

logger = logging.getLogger(__name__)

SCALE = "_scale"
_LOADS = 2
_CHUNK_BYTES = 1 << 21
# A prime: other distances than its multiples separate elements that a wrong order of rows or groups would exchange.
_PERIOD = 65_521
_TOKENS, _OUTPUTS = 4, 64
# Float32 sums of products: 2^-24 for each addition, twice that for units that truncate.
_ADDITION = 2.0**-23
# Scales of 2^-63 .. 2^63 for the first load, and of 2^-8 .. 2^7 for one with a product.
_ANY_SCALE, _MODERATE_SCALE = tuple(range(64, 191)), tuple(range(119, 135))

L = TypeVar("L", bound=nn.Module)
# Takes a weight's name and the indices of elements, the last one that of the input; returns their float64 values.
Values = Callable[..., torch.Tensor]


def run_on_each_kind(
    layers: Mapping[str, L],
    kind_of: Callable[[L], Hashable],
    test: Callable[[L], None],
    *,
    weight_format: str,
    release: str,
    alternative: str,
) -> None:
    """Test the smallest layer of each kind.

    Args:
        weight_format: MXFP8 or MXFP4.
        release: what made the layers, for messages: "vllm-ascend 0.30.0rc2".
        alternative: what to use instead of another release, for messages.

    Raises:
        RuntimeError: the first difference: layer, release, parameter, and what differs.
    """
    started, tested = time.perf_counter(), _smallest_of_each_kind(layers, kind_of)
    for name, layer in tested.items():
        try:
            test(layer)
        except Exception as error:
            raise RuntimeError(
                f"the {weight_format} self-test failed in {name} with {release}: {str(error).lstrip('.')}. The engine "
                "would generate from other weights than those it is sent; use another release (the newest tested one "
                f"is {NEWEST_TESTED}), or {alternative}"
            ) from error
    logger.info("%s self-test: %d layers in %.2f s", weight_format, len(tested), time.perf_counter() - started)


def _smallest_of_each_kind(layers: Mapping[str, L], kind_of: Callable[[L], Hashable]) -> dict[str, L]:
    found: dict[Hashable, str] = {}
    sizes = {
        name: sum(p.numel() for p in layer._parameters.values() if p is not None) for name, layer in layers.items()
    }
    for name in sorted(layers, key=lambda name: sizes[name]):
        found.setdefault(kind_of(layers[name]), name)
    return {name: layers[name] for name in found.values()}


@dataclass(frozen=True)
class KnownBytes:
    """Known bytes of a parameter in checkpoint layout, as a function of the index in the flattened tensor.

    Attributes:
        shape: shape of the parameter.
        bytes: uint8 [`_PERIOD`] on the CPU, repeated until the tensor is full.
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
                count, offset = (rows.stop - first) * k, (number * n + first) * k % _PERIOD
                repeated = source.repeat(-(-(offset + count) // _PERIOD))
                yield index, rows, repeated[offset : offset + count].view(-1, k)

    def at(self, *indices: torch.Tensor | int) -> torch.Tensor:
        """Return the elements at int64 indices, one tensor for each dimension, which broadcast against each other."""
        flat = torch.zeros((), dtype=torch.int64)
        for index, size in zip(indices, self.shape, strict=True):
            flat = flat * size + index
        return self.bytes[flat % _PERIOD]


@dataclass(frozen=True)
class ByteChoices:
    """The bytes that weights of a format are filled with.

    Attributes:
        any: bytes of weights.
        powers_of_two, scales: bytes of w13 and its scales, for a first product that is a power of two.
    """

    any: tuple[int, ...]
    powers_of_two: tuple[int, ...]
    scales: tuple[int, ...]


def _known_weights(shapes: Mapping[str, tuple[int, ...]], choices: ByteChoices, load: int) -> dict[str, KnownBytes]:
    """Return the bytes of each parameter for load 0 or 1."""
    known = {}
    for number, (key, shape) in enumerate(shapes.items()):
        is_scale = key.endswith(SCALE)
        if load == 0:
            values = _ANY_SCALE if is_scale else choices.any
        elif key.startswith("w13"):
            values = choices.scales if is_scale else choices.powers_of_two
        else:
            values = _MODERATE_SCALE if is_scale else choices.any
        generator = torch.Generator().manual_seed(100 * load + number)
        choice = torch.randint(len(values), (_PERIOD,), generator=generator)
        known[key] = KnownBytes(tuple(shape), torch.tensor(values, dtype=torch.uint8)[choice])
    return known


def load_known_weights(
    layer: L,
    shapes: Mapping[str, tuple[int, ...]],
    choices: ByteChoices,
    *,
    restore: Callable[[L], None],
    transform: Callable[[L], None],
    count_wrong_bytes: Callable[[str, KnownBytes], int],
) -> dict[str, KnownBytes]:
    """Load known bytes twice, the second time other ones, and check bytes and addresses after each load.

    Args:
        shapes: shapes of weights and scales in the checkpoint layout, by parameter name.
        restore, transform: the hooks before and after a load.
        count_wrong_bytes: compares a parameter in kernel layout with known bytes.

    Returns:
        The bytes of the second load.

    Raises:
        RuntimeError: wrong bytes, or a parameter that moved.
    """
    before = _addresses(layer, shapes)
    for load in range(_LOADS):
        known = _known_weights(shapes, choices, load)
        restore(layer)
        for key, weights in known.items():
            target = getattr(layer, key).data
            for index, rows, values in weights.parts(target.device):
                target[(*index, rows)].copy_(values.view(target.dtype))
        transform(layer)
        for key, weights in known.items():
            if wrong := count_wrong_bytes(key, weights):
                raise RuntimeError(
                    f"{key}: {wrong} of {getattr(layer, key).numel()} bytes of the kernel layout are not those that "
                    f"load {load + 1} wrote"
                )
        for key, address in _addresses(layer, shapes).items():
            if address != before[key]:
                raise RuntimeError(
                    f"{key} moved in load {load + 1}: address, shape and strides were {before[key]}, now {address}; "
                    "captured graphs would read the old memory"
                )
    return known


def _addresses(layer: nn.Module, names: Collection[str]) -> dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]]:
    data = {key: getattr(layer, key).data for key in names}
    return {key: (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) for key, tensor in data.items()}


def _spread(size: int, count: int) -> torch.Tensor:
    """Return up to `count` indices from 0 to size - 1, the first and the last included."""
    return torch.linspace(0, size - 1, min(size, count), dtype=torch.float64).long()


def _exact_inputs(k: int) -> torch.Tensor:
    """Return inputs [`_TOKENS`, k] of similar size, float64, which a round trip through MXFP8 does not change."""
    generator = torch.Generator().manual_seed(7)
    significand = 8 + torch.randint(7, (_TOKENS, k), generator=generator).double()
    sign = 1 - 2 * torch.randint(2, (_TOKENS, k), generator=generator)
    return sign * torch.ldexp(significand, -3 - torch.randint(4, (_TOKENS, k), generator=generator))


def check_products(
    layer: Any,
    known: Mapping[str, KnownBytes],
    values: Values,
    vllm_config: Any,
    *,
    weight_format: str,
    packed: int = 1,
) -> None:
    """Compare the layer's own products with those of the dequantized weights.

    Args:
        known: the bytes that the layer holds.
        weight_format: MXFP8 or MXFP4.
        packed: values in a byte.

    Raises:
        RuntimeError: a product differs.
    """
    if len(known) == 2:
        _check_product(layer, known, values, vllm_config.model_config.dtype, packed)
    else:
        _check_experts(layer, known, values, vllm_config, weight_format, packed)


def _check_product(
    layer: Any, known: Mapping[str, KnownBytes], values: Values, dtype: torch.dtype, packed: int
) -> None:
    """Compare the layer's product with that of the dequantized weight, for some of its outputs.

    Inputs are e4m3 numbers of similar size, so quantizing them changes nothing. A sum of K exact products in float32
    differs by at most K 2^-24 times the sum of their magnitudes (Higham, Accuracy and Stability, 2002, section 3.1).
    """
    n, row_bytes = known["weight"].shape
    k = packed * row_bytes
    x, outputs = _exact_inputs(k), _spread(n, _OUTPUTS)
    weight, device = values("weight", outputs[:, None], torch.arange(k)), layer.weight_scale.device
    with torch.no_grad():
        product = layer.quant_method.apply(layer, x.to(device, dtype))
    _compare("weight", product[:, outputs.to(device)], x @ weight.T, k * (x.abs() @ weight.abs().T))


def _check_experts(
    layer: Any, known: Mapping[str, KnownBytes], values: Values, vllm_config: Any, weight_format: str, packed: int
) -> None:
    """Compare the output of single experts with that of the dequantized weights, for some of its elements.

    A token is 1 at one position, so the first product is a column of w13: powers of two of at least 2^5. Then silu(g)
    is g in float32, and silu(g) * u is a power of two, which MXFP8 holds exactly, and so does bfloat16, to which
    vllm-ascend rounds the first product of MXFP4 weights. The output is a single sum.
    """
    activation, experts = layer.activation, known["w13_weight"].shape[0]
    one_rank = getattr(layer, "expert_map", None) is None
    if getattr(activation, "value", activation) != "silu" or getattr(layer, "swiglu_limit", None) or not one_rank:
        what = "experts other than silu experts of one rank"
        logger.info("the %s self-test compares no product of %s", weight_format, what)
        return
    (_, n, row_bytes), (_, hidden, inner_bytes) = known["w13_weight"].shape, known["w2_weight"].shape
    k, inner = packed * row_bytes, packed * inner_bytes
    expert = _spread(experts, _TOKENS).repeat_interleave(2)
    position = torch.tensor([0, k - 1]).repeat(len(expert) // 2)
    x = torch.zeros(len(expert), k).scatter_(1, position[:, None], 1.0)
    logits = torch.zeros(len(expert), experts).scatter_(1, expert[:, None], 256.0)  # exp(-256) is 0
    gate, up = values("w13_weight", expert[:, None], torch.arange(n), position[:, None]).chunk(2, dim=1)
    outputs = _spread(hidden, _OUTPUTS)
    w2 = values("w2_weight", expert[:, None, None], outputs[:, None], torch.arange(inner))
    terms = (gate / (1 + torch.exp(-gate)) * up)[:, None] * w2
    device, dtype = layer.w13_weight.device, vllm_config.model_config.dtype
    product = experts_output(layer, vllm_config, x.to(device, dtype), logits.to(device, dtype))
    _compare("w13_weight and w2_weight", product[:, outputs.to(device)], terms.sum(-1), inner * terms.abs().sum(-1))


def _compare(what: str, product: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor) -> None:
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
