"""MX operators: quantization of activations to MXFP8, and their products with matrices in MXFP8 or MXFP4.

Scales are pairs of groups: the quantized axis has ceil(ceil(K / 32) / 2) entries, and a trailing axis has 2. With an
odd number of groups the last byte is padding (0), which no operator here reads.
"""

import torch

from torch_npu._dtypes import float4_e2m1fn_x2, is_fp4, reject, require_e4m3, require_e8m0
from torch_npu._format import FRACTAL_NZ_C0_16, as_operators_read, get_npu_format
from verl.utils.quantization.mxfp4 import mxfp4_dequantize
from verl.utils.quantization.mxfp8 import MX_BLOCK_SIZE, mxfp8_dequantize, mxfp8_quantize


def npu_dynamic_mx_quant(
    input: torch.Tensor,
    *,
    axis: int = -1,
    round_mode: str = "rint",
    dst_type=float4_e2m1fn_x2,
    block_size: int = MX_BLOCK_SIZE,
    scale_alg: int = 0,
    dst_type_max: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values of input's shape, and uint8 scales: `axis` has ceil(ceil(K / 32) / 2) entries, a new last axis 2.

    The default `dst_type` is FP4, as in torch_npu, and is not supported.
    """
    require_e4m3("npu_dynamic_mx_quant: dst_type", dst_type)
    if input.dtype not in (torch.float16, torch.bfloat16):
        # Tests of numerics use float32, which the NPU's operator does not support.
        assert input.dtype == torch.float32, f"npu_dynamic_mx_quant: input is {input.dtype}"
    if round_mode != "rint" or block_size != MX_BLOCK_SIZE or dst_type_max != 0.0:
        raise NotImplementedError(f"npu_dynamic_mx_quant: {round_mode=}, {block_size=}, {dst_type_max=}")
    moved = input.movedim(axis, -1)
    values, scales = mxfp8_quantize(moved.contiguous(), scale_alg=scale_alg)
    pairs = pair_groups(scales)
    axis = axis % input.ndim
    return values.movedim(-1, axis).contiguous(), pairs.movedim(-2, axis).contiguous()


def pair_groups(scales: torch.Tensor) -> torch.Tensor:
    """Reshape [..., G] to [..., ceil(G / 2), 2], with a zero byte after an odd number of groups."""
    padded = torch.nn.functional.pad(scales, (0, scales.shape[-1] % 2))
    return padded.unflatten(-1, (-1, 2))


def dequantize_rows(values: torch.Tensor, scales: torch.Tensor, what: str) -> torch.Tensor:
    """Dequantize activations [M, K] with scales [M, ceil(G / 2), 2] to float32."""
    k = values.shape[-1]
    groups = -(-k // MX_BLOCK_SIZE)
    expected = (*values.shape[:-1], -(-groups // 2), 2)
    if values.dtype != torch.float8_e4m3fn or tuple(scales.shape) != expected:
        raise RuntimeError(
            f"{what}: float8_e4m3fn values {list(values.shape)} need scales {list(expected)}; got {values.dtype} and "
            f"scales {list(scales.shape)}"
        )
    return mxfp8_dequantize(values.contiguous(), scales.flatten(-2)[..., :groups].contiguous())


def dequantize_weight(weight: torch.Tensor, scale: torch.Tensor, what: str) -> torch.Tensor:
    """Dequantize a weight in the kernel layout, [..., K, N] with scales [..., ceil(G / 2), N, 2], to float32."""
    rows = as_operators_read(weight).transpose(-1, -2)
    return dequantize_rows(rows, scale.transpose(-2, -3), what).transpose(-1, -2)


def dequantize_fp4_weight(weight: torch.Tensor, scale: torch.Tensor, what: str) -> torch.Tensor:
    """Do the same for packed FP4: uint8 [..., K / 2, N] in FRACTAL_NZ with scales [..., K / 64, N, 2]."""
    if get_npu_format(weight) != FRACTAL_NZ_C0_16:
        raise RuntimeError(f"{what}: an FP4 weight must be in FRACTAL_NZ, cast for activations in FP8")
    rows, scales = as_operators_read(weight).transpose(-1, -2), scale.transpose(-2, -3)
    expected = (*rows.shape[:-1], rows.shape[-1] // MX_BLOCK_SIZE, 2)
    if weight.dtype != torch.uint8 or tuple(scales.shape) != expected or rows.shape[-1] % MX_BLOCK_SIZE:
        raise RuntimeError(
            f"{what}: uint8 rows {list(rows.shape)} need scales {list(expected)}; got {weight.dtype} and scales "
            f"{list(scales.shape)}"
        )
    return mxfp4_dequantize(rows.contiguous(), scales.flatten(-2).contiguous()).transpose(-1, -2)


def npu_quant_matmul(
    x1: torch.Tensor,
    x2: torch.Tensor,
    scale: torch.Tensor,
    *,
    offset=None,
    pertoken_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    output_dtype: torch.dtype | None = None,
    x1_dtype=None,
    x2_dtype=None,
    pertoken_scale_dtype=None,
    scale_dtype=None,
    group_sizes=None,
    y_scale=None,
) -> torch.Tensor:
    """Multiply x1 [M, K] with pertoken_scale [M, ceil(K / 64), 2] by x2 [K, N] with scale [ceil(K / 64), N, 2].

    With x2_dtype=float4_e2m1fn_x2, x2 is packed FP4 [K / 2, N].
    Sums are in float32, as on an NPU, whose order of summation is unknown.
    """
    reject("npu_quant_matmul", offset=offset, x1_dtype=x1_dtype, y_scale=y_scale)
    fp4 = is_fp4("npu_quant_matmul: x2_dtype", x2_dtype)
    require_e8m0("npu_quant_matmul: scale_dtype", scale_dtype)
    require_e8m0("npu_quant_matmul: pertoken_scale_dtype", pertoken_scale_dtype)
    if list(group_sizes or ()) != [*((0, 0) if fp4 else (1, 1)), MX_BLOCK_SIZE]:
        raise NotImplementedError(f"npu_quant_matmul: {group_sizes=}: MXFP8 is [1, 1, 32], FP4 weights [0, 0, 32]")
    if bias is not None and (bias.dtype != torch.float32 or tuple(bias.shape) != (x2.shape[1],)):
        raise RuntimeError(
            f"npu_quant_matmul: bias must be float32 [{x2.shape[1]}], got {bias.dtype} {list(bias.shape)}"
        )
    left = dequantize_rows(x1, pertoken_scale, "npu_quant_matmul: x1")
    right = (dequantize_fp4_weight if fp4 else dequantize_weight)(x2, scale, "npu_quant_matmul: x2")
    product = left @ right
    if bias is not None:
        product += bias
    return product.to(output_dtype)
