"""Operators of a mixture of experts: routing, grouped products, and unpermuting.

Tokens are sorted by expert; `group_list` holds the tokens per expert as counts (group_list_type 1) or cumulative (0).
"""

import torch

from torch_npu._dense import npu_swiglu
from torch_npu._dtypes import is_fp4, reject, require_e4m3, require_e8m0
from torch_npu._format import as_operators_read
from torch_npu._mx import dequantize_fp4_weight, dequantize_rows, dequantize_weight, npu_dynamic_mx_quant


def _counts(group_list: torch.Tensor, group_list_type: int) -> list[int]:
    if group_list_type not in (0, 1):
        raise NotImplementedError(f"{group_list_type=}: must be 0 (cumulative) or 1 (counts)")
    counts = group_list if group_list_type == 1 else torch.diff(group_list, prepend=group_list.new_zeros(1))
    return counts.tolist()


def _one(argument, name: str) -> torch.Tensor:
    tensors = argument if isinstance(argument, list | tuple) else [argument]
    if len(tensors) != 1:
        raise NotImplementedError(f"{name}: {len(tensors)} tensors; the stand-in supports one tensor with all experts")
    return tensors[0]


def _grouped(x: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Multiply `counts` rows of x [M, K] by each of weight [E, K, N]; rows after the last group stay zero."""
    if len(counts) != weight.shape[0] or sum(counts) > x.shape[0]:
        raise RuntimeError(f"group_list {counts}: {weight.shape[0]} experts and {x.shape[0]} rows")
    result = x.new_zeros(x.shape[0], weight.shape[-1])
    start = 0
    for expert, count in enumerate(counts):
        result[start : start + count] = x[start : start + count] @ weight[expert]
        start += count
    return result


def npu_grouped_matmul(
    x,
    weight,
    *,
    bias=None,
    scale=None,
    per_token_scale=None,
    group_list: torch.Tensor,
    split_item: int = 0,
    group_type: int = -1,
    group_list_type: int = 0,
    output_dtype: torch.dtype | None = None,
    scale_dtype=None,
    antiquant_scale=None,
    per_token_scale_dtype=None,
    x_dtype=None,
    weight_dtype=None,
    **others,
) -> list[torch.Tensor]:
    """Return [rows of x times their expert's weight [E, K, N]]; with scales in MXFP8, computed in float32.

    FP4 weights have `antiquant_scale`, and the dtypes of x and weight are given.
    """
    reject("npu_grouped_matmul", **others)
    if split_item not in (2, 3) or group_type != 0:
        raise NotImplementedError(
            f"npu_grouped_matmul: {split_item=}, {group_type=}: only one x grouped by rows is supported"
        )
    if bias is not None and any(b is not None for b in (bias if isinstance(bias, list | tuple) else [bias])):
        raise NotImplementedError("npu_grouped_matmul: bias is not supported by the stand-in")
    x, weight = _one(x, "x"), _one(weight, "weight")
    counts = _counts(group_list, group_list_type)
    what = "npu_grouped_matmul"
    if is_fp4(f"{what}: weight_dtype", weight_dtype):
        reject(what, scale=scale, scale_dtype=scale_dtype)
        require_e4m3(f"{what}: x_dtype", x_dtype)
        require_e8m0(f"{what}: per_token_scale_dtype", per_token_scale_dtype)
        left = dequantize_rows(x, _one(per_token_scale, "per_token_scale"), f"{what}: x")
        right = dequantize_fp4_weight(weight, _one(antiquant_scale, "antiquant_scale"), f"{what}: weight")
        return [_grouped(left, right, counts).to(output_dtype)]
    reject(what, x_dtype=x_dtype, antiquant_scale=antiquant_scale)
    if scale is None:
        return [_grouped(x, as_operators_read(weight), counts).to(output_dtype or x.dtype)]
    require_e8m0("npu_grouped_matmul: scale_dtype", scale_dtype)
    require_e8m0("npu_grouped_matmul: per_token_scale_dtype", per_token_scale_dtype)
    left = dequantize_rows(x, _one(per_token_scale, "per_token_scale"), "npu_grouped_matmul: x")
    right = dequantize_weight(weight, _one(scale, "scale"), "npu_grouped_matmul: weight")
    return [_grouped(left, right, counts).to(output_dtype)]


def npu_grouped_matmul_swiglu_quant_v2(
    x: torch.Tensor,
    weight,
    weight_scale,
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    *,
    smooth_scale=None,
    weight_assist_matrix=None,
    bias=None,
    dequant_mode: int = 0,
    dequant_dtype: torch.dtype = torch.float32,
    quant_mode: int = 0,
    quant_dtype=torch.float8_e4m3fn,
    group_list_type: int = 0,
    x_dtype=None,
    weight_dtype=None,
    weight_scale_dtype=None,
    x_scale_dtype=None,
    **others,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute a grouped product, then silu of the first half times the second, and quantize it; mode 2 is MXFP8."""
    reject("npu_grouped_matmul_swiglu_quant_v2", smooth_scale=smooth_scale, bias=bias, **others)
    reject("npu_grouped_matmul_swiglu_quant_v2", weight_assist_matrix=weight_assist_matrix)
    reject("npu_grouped_matmul_swiglu_quant_v2", x_dtype=x_dtype, weight_dtype=weight_dtype)
    if dequant_mode != 2 or quant_mode != 2 or dequant_dtype != torch.float32:
        raise NotImplementedError(
            f"npu_grouped_matmul_swiglu_quant_v2: {dequant_mode=}, {quant_mode=}, {dequant_dtype=}"
        )
    require_e4m3("npu_grouped_matmul_swiglu_quant_v2: quant_dtype", quant_dtype)
    require_e8m0("npu_grouped_matmul_swiglu_quant_v2: weight_scale_dtype", weight_scale_dtype)
    require_e8m0("npu_grouped_matmul_swiglu_quant_v2: x_scale_dtype", x_scale_dtype)
    left = dequantize_rows(x, x_scale, "npu_grouped_matmul_swiglu_quant_v2: x")
    right = dequantize_weight(_one(weight, "weight"), _one(weight_scale, "weight_scale"), "weight")
    hidden = npu_swiglu(_grouped(left, right, _counts(group_list, group_list_type)))
    return npu_dynamic_mx_quant(hidden, dst_type=quant_dtype)


def npu_moe_gating_top_k_softmax(
    x: torch.Tensor, finished: torch.Tensor | None = None, k: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (the k largest probabilities, their experts int32, row numbers int32 in the order of the routing)."""
    reject("npu_moe_gating_top_k_softmax", finished=finished)
    weights, experts = x.float().softmax(-1).topk(k, dim=-1)
    rows = torch.arange(x.shape[0] * k, dtype=torch.int32).view(k, -1).T.contiguous()
    return weights.to(x.dtype), experts.to(torch.int32), rows


def npu_moe_gating_top_k(
    x: torch.Tensor,
    k: int,
    *,
    bias: torch.Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do the same with softmax (norm_type 0) or sigmoid (1), without expert groups; sigmoid's weights sum to one."""
    if k_group != 1 or group_count != 1 or renorm != 0 or norm_type not in (0, 1):
        raise NotImplementedError(f"npu_moe_gating_top_k: {k_group=}, {group_count=}, {renorm=}, {norm_type=}")
    scores = x.float().softmax(-1) if norm_type == 0 else x.float().sigmoid()
    experts = (scores if bias is None else scores + bias.float()).topk(k, dim=-1).indices
    weights = scores.gather(-1, experts)
    if norm_type == 1:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    rows = torch.arange(x.shape[0] * k, dtype=torch.int32).view(k, -1).T.contiguous()
    return (weights * routed_scaling_factor).to(x.dtype), experts.to(torch.int32), rows


def npu_moe_init_routing_v2(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    offset=None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range=(),
    row_idx_type: int = 0,
    x_dtype=None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Copy the rows of x [M, H] once for each of their experts [M, k], sorted by expert.

    Returns the rows; the target (row_idx_type 0: [M * k]) or the source (1) of each (row, choice); the tokens of each
    expert (counts for type 1, cumulative for 0); and the scales of the rows. quant_mode 3 quantizes the rows to MXFP8,
    -1 does not quantize.
    """
    reject("npu_moe_init_routing_v2", offset=offset, x_dtype=x_dtype)
    if (
        drop_pad_mode != 0
        or quant_mode not in (-1, 3)
        or not expert_tokens_num_flag
        or expert_tokens_num_type not in (0, 1)
    ):
        raise NotImplementedError(
            f"npu_moe_init_routing_v2: {drop_pad_mode=}, {quant_mode=}, {expert_tokens_num_type=}"
        )
    first, last = (*active_expert_range, 0, expert_num)[:2] if active_expert_range else (0, expert_num)
    choices = expert_idx.flatten().long()
    active = (choices >= first) & (choices < last)
    # Experts of other ranks are sorted behind those of this rank.
    order = torch.where(active, choices, choices.max() + last + 1).argsort(stable=True)
    source = order // expert_idx.shape[1]
    counts = torch.bincount(choices[active] - first, minlength=last - first)
    tokens = counts if expert_tokens_num_type == 1 else counts.cumsum(0)
    where = order if row_idx_type == 1 else torch.argsort(order)
    if quant_mode == 3:
        reject("npu_moe_init_routing_v2 with quant_mode=3", scale=scale)
        rows, scales = npu_dynamic_mx_quant(x[source], dst_type=torch.float8_e4m3fn)
    else:
        rows, scales = x[source], scale[source] if scale is not None else None
    return rows, where.to(torch.int32), tokens.to(torch.int64), scales


def npu_moe_token_unpermute(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None = None,
    padded_mode: bool = False,
    restore_shape=None,
) -> torch.Tensor:
    """Return the rows to their tokens: weight the k rows of each by probs [M, k] and sum them."""
    reject("npu_moe_token_unpermute", restore_shape=restore_shape)
    if padded_mode or probs is None:
        raise NotImplementedError(f"npu_moe_token_unpermute: {padded_mode=}, probs={probs}")
    rows = permuted_tokens[sorted_indices.abs().long()].view(*probs.shape, -1)
    return (rows.float() * probs.float()[..., None]).sum(1).to(permuted_tokens.dtype)


def npu_swiglu_group_quant(
    x: torch.Tensor,
    topk_weight: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
    dst_type: torch.dtype = torch.float8_e4m3fn,
    quant_mode: int = 0,
    clamp_value: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute silu of the first half times the second, and quantize it; mode 2 is MXFP8.

    vllm-ascend has this operator in its own compiled code (`torch.ops._C_ascend`). `group_index` holds the rows of each
    group, whose sum is the number of rows to compute; the others stay zero here.
    """
    reject("npu_swiglu_group_quant", topk_weight=topk_weight)
    if quant_mode != 2 or clamp_value:
        raise NotImplementedError(f"npu_swiglu_group_quant: {quant_mode=}, {clamp_value=}")
    require_e4m3("npu_swiglu_group_quant: dst_type", dst_type)
    hidden = npu_swiglu(x.float())
    if group_index is not None:
        hidden[int(group_index.sum()) :] = 0
    values, scales = npu_dynamic_mx_quant(hidden, dst_type=dst_type)
    return values, scales, x.new_empty(0)
