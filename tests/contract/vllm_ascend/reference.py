"""The expected parameters of an engine after an update, computed from the checkpoint without the code under test.

Names are vLLM's, without the differences between its releases (`canonical`); bytes are those of the kernel layout.
"""

import re
import sys
from collections.abc import Callable, Mapping

import numpy as np
import torch

GROUP = 32
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
ROW_PARALLEL = ("o_proj", "down_proj")
_SHARDS = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
_SHARDS |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_PROJECTION = re.compile(r"(.+)\.(q|k|v|o|gate|up|down)_proj\.weight")


def _magnitudes() -> np.ndarray:
    """Return the values of the e4m3 codes 0..126: 4 exponent bits (bias 7), 3 mantissa bits; 127 is NaN."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    return np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))


_E4M3 = _magnitudes()


def quantized(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Quantize by OCP MX v1.0, section 6.3: e4m3 codes [.., N, K] and E8M0 bytes [.., N, ceil(K / 32)], both uint8."""
    values = weight.double().numpy()
    k = values.shape[-1]
    groups = -(-k // GROUP)
    codes, scales = np.zeros(values.shape, np.uint8), np.zeros((*values.shape[:-1], groups), np.uint8)
    for group in range(groups):
        block = values[..., group * GROUP : (group + 1) * GROUP]
        largest = np.abs(block).max(-1, keepdims=True)
        exponent = np.frexp(np.where(largest == 0, 1, largest))[1] - 1 - 8
        byte = np.where(largest == 0, 0, np.clip(exponent + 127, 0, 254))
        scales[..., group] = byte[..., 0]
        codes[..., group * GROUP : (group + 1) * GROUP] = _nearest(block / 2.0 ** (byte - 127.0))
    return codes, scales


def _nearest(scaled: np.ndarray) -> np.ndarray:
    """Return the nearest code, ties to the even one; larger values saturate."""
    magnitude = np.minimum(np.abs(scaled), _E4M3[-1])
    above = np.clip(np.searchsorted(_E4M3, magnitude), 1, 126)
    to_above, to_below = _E4M3[above] - magnitude, magnitude - _E4M3[above - 1]
    take_above = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return (np.where(take_above, above, above - 1) | np.where(np.signbit(scaled), 128, 0)).astype(np.uint8)


def quantized_fp4(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Do the same with e2m1: packed codes [.., N, K / 2], the first of two values in the low bits, and E8M0 bytes."""
    values = weight.double().numpy()
    blocks = values.reshape(*values.shape[:-1], -1, GROUP)
    largest = np.abs(blocks).max(-1)
    exponent = np.frexp(np.where(largest == 0, 1, largest))[1] - 1 - 2
    bytes_ = np.where(largest == 0, 0, np.clip(exponent + 127, 0, 254))
    scaled = blocks / 2.0 ** (bytes_[..., None] - 127.0)
    # The nearest of the eight magnitudes; of two equally near ones, the one with the even code.
    distance = np.abs(np.abs(scaled)[..., None] - E2M1)
    nearest = distance == distance.min(-1, keepdims=True)
    codes = np.where(nearest, np.where(np.arange(8) % 2, 8, 0) + np.arange(8), 99).argmin(-1)
    codes = (codes + np.where(np.signbit(scaled), 8, 0)).reshape(values.shape)
    return (codes[..., 0::2] + 16 * codes[..., 1::2]).astype(np.uint8), bytes_.astype(np.uint8)


def dequantized_fp4(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the float64 values [.., N, K] of packed codes and scales."""
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)
    return np.where(codes & 8, -1.0, 1.0) * E2M1[codes & 7] * np.repeat(2.0 ** (scales - 127.0), GROUP, axis=-1)


def rounded_fp4(x: torch.Tensor) -> np.ndarray:
    """Return x [.., K] after a round trip through MXFP4, in float64."""
    return dequantized_fp4(*quantized_fp4(x))


def dequantized(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the float64 values [.., N, K] of codes and scales."""
    signs = np.where(codes & 128, -1.0, 1.0)
    factors = np.repeat(2.0 ** (scales - 127.0), GROUP, axis=-1)[..., : codes.shape[-1]]
    return signs * _E4M3[codes & 127] * factors


def rounded(x: torch.Tensor) -> np.ndarray:
    """Return x [.., K] after a round trip through MXFP8, in float64."""
    return dequantized(*quantized(x))


def kernel_layout(codes: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return weight [.., K, N] and scales [.., ceil(G / 2), N, 2], as the operators read them; missing groups are 0."""
    *lead, n, groups = scales.shape
    pairs = np.zeros((*lead, -(-groups // 2), n, 2), np.uint8)
    for group in range(groups):
        pairs[..., group // 2, :, group % 2] = scales[..., group]
    return np.ascontiguousarray(np.swapaxes(codes, -1, -2)), pairs


def packed(checkpoint: Mapping[str, torch.Tensor], *, rank: int = 0, ranks: int = 1) -> dict[str, torch.Tensor]:
    """Return the unquantized tensors [.., N, K] of tensor-parallel `rank` of `ranks`, packed as in vLLM."""
    parts: dict[str, list[torch.Tensor]] = {}
    experts: dict[str, dict[int, list[torch.Tensor]]] = {}
    for name in sorted(checkpoint, key=_shard_order):
        expert = _EXPERT.fullmatch(name)
        last = name.split(".")[-2]
        axis = 1 if last in ROW_PARALLEL else 0
        divided = last in _SHARDS or last in ROW_PARALLEL or last in ("embed_tokens", "lm_head")
        tensor = checkpoint[name].chunk(ranks, axis)[rank] if divided else checkpoint[name]
        if expert:
            key = f"{expert[1]}.{'w2' if expert[3] == 'down' else 'w13'}_weight"
            experts.setdefault(key, {}).setdefault(int(expert[2]), []).append(tensor)
        else:
            parts.setdefault(name.replace(last, _SHARDS.get(last, last)), []).append(tensor)
    whole = {name: torch.cat(tensors) for name, tensors in parts.items()}
    return whole | {name: torch.stack([torch.cat(each[i]) for i in sorted(each)]) for name, each in experts.items()}


def engine_parameters(
    checkpoint: Mapping[str, torch.Tensor],
    *,
    rank: int = 0,
    ranks: int = 1,
    left_out: tuple[str, ...] = (),
    fp4: Callable[[str], bool] = lambda name: False,
) -> dict[str, np.ndarray]:
    """Return every parameter of tensor-parallel `rank` of `ranks`, without padding: uint8 if quantized, else float32.

    Args:
        left_out: parts of the names of layers that are not quantized.
        fp4: returns whether the weight of a parameter is in MXFP4, not in MXFP8.
    """
    result = {}
    whole = packed(checkpoint)
    for name, tensor in packed(checkpoint, rank=rank, ranks=ranks).items():
        if is_projection(name) and not any(part in name for part in left_out):
            if fp4(name):
                codes, scales = quantized_fp4(tensor)
            elif name.split(".")[-2] in ROW_PARALLEL:  # a share can begin or end inside a group of the checkpoint
                codes, scales = quantized(whole[name])
                share = codes.shape[1] // ranks
                start, end = rank * share, (rank + 1) * share
                codes, scales = codes[:, start:end], scales[:, start // GROUP : -(-end // GROUP)]
            else:
                codes, scales = quantized(tensor)
            result[name], result[f"{name}_scale"] = kernel_layout(codes, scales)
        else:
            result[name] = tensor.float().numpy()
    return result


def _shard_order(name: str) -> tuple[str, int]:
    order = ["q", "k", "v", "gate", "up", "down", "o"]
    match = _PROJECTION.fullmatch(name)
    return (match[1], order.index(match[2])) if match else (name, 0)


def is_projection(name: str) -> bool:
    """Return whether a packed tensor can be quantized."""
    return ".experts." in name or name.split(".")[-2] in {*_SHARDS.values(), *ROW_PARALLEL}


def canonical(name: str) -> str:
    """Return the name of a parameter in every release: from vLLM 0.24 on experts are one module deeper."""
    return name.replace(".experts.routed_experts.", ".experts.")


def parameters_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Return the parameters of a model, in the form of `engine_parameters`."""
    result = {}
    for name, parameter in model.named_parameters():
        layer, _, key = name.rpartition(".")
        data = _as_operators_read(parameter.data).contiguous()
        if key == "weight":
            data = _unpadded(data, model.get_submodule(layer))
        bytes_ = data.dtype in (torch.float8_e4m3fn, torch.uint8)
        result[canonical(name)] = (data.view(torch.uint8) if bytes_ else data.float()).numpy().copy()
    return result


def _as_operators_read(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in ND; outside the environment of a release there are no other formats."""
    if "torch_npu" not in sys.modules:
        return tensor
    from torch_npu._format import as_operators_read

    return as_operators_read(tensor)


def _unpadded(weight: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
    """Return a kernel weight [K, N] without the rows with which a release pads row-parallel layers; they must be 0."""
    before, after = vars(layer).get("mxfp8_tp_padding", (0, 0))
    end = len(weight) - after
    padding = torch.cat([weight[:before].float(), weight[end:].float()])
    assert not padding.any(), "the padding of a weight is not zero"
    return weight[before:end]


def assert_same(actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Compare names, shapes and every byte."""
    assert sorted(actual) == sorted(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and actual[name].shape == value.shape, name
        wrong = np.count_nonzero(actual[name] != value)
        assert not wrong, f"{name}: {wrong} of {value.size} differ"
