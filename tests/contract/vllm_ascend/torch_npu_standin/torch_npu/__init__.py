"""A stand-in for torch_npu on a machine without an NPU: the parts that vllm-ascend's MX formats need, on the CPU.

A missing name raises AttributeError, as in a torch_npu that lacks it: callers check with `hasattr`. An operator accepts
only arguments with a known meaning and rejects the others, so that no test passes for a reason that does not hold on an
NPU. Nothing here was compared with an NPU.
"""

import sys

import torch

from torch_npu import _C, npu, op_plugin, profiler
from torch_npu._dense import (
    npu_add_rms_norm,
    npu_fusion_attention,
    npu_rms_norm,
    npu_rotary_mul,
    npu_swiglu,
)
from torch_npu._dtypes import (
    float4_e1m2fn_x2,
    float4_e2m1fn_x2,
    float8_e4m3fn,
    float8_e5m2,
    float8_e8m0fnu,
    hifloat8,
    int4,
)
from torch_npu._format import get_npu_format, npu_format_cast
from torch_npu._moe import (
    npu_grouped_matmul,
    npu_grouped_matmul_swiglu_quant_v2,
    npu_moe_gating_top_k,
    npu_moe_gating_top_k_softmax,
    npu_moe_init_routing_v2,
    npu_moe_token_unpermute,
    npu_swiglu_group_quant,
)
from torch_npu._mx import npu_dynamic_mx_quant, npu_quant_matmul

__version__ = "2.10.0+standin"
__all__ = [
    "_C",
    "float4_e1m2fn_x2",
    "float4_e2m1fn_x2",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e8m0fnu",
    "get_npu_format",
    "hifloat8",
    "int4",
    "npu",
    "npu_add_rms_norm",
    "npu_dynamic_mx_quant",
    "npu_format_cast",
    "npu_fusion_attention",
    "npu_grouped_matmul",
    "npu_grouped_matmul_swiglu_quant_v2",
    "npu_moe_gating_top_k",
    "npu_moe_gating_top_k_softmax",
    "npu_moe_init_routing_v2",
    "npu_moe_token_unpermute",
    "npu_quant_matmul",
    "npu_rms_norm",
    "npu_rotary_mul",
    "npu_swiglu",
    "op_plugin",
    "profiler",
]

# vllm-ascend compiles this operator itself.
_ascend_operators = torch.library.Library("_C_ascend", "FRAGMENT")
_ascend_operators.define(
    "npu_swiglu_group_quant(Tensor x, *, Tensor? topk_weight=None, Tensor? group_index=None, "
    "ScalarType dst_type=float8_e4m3fn, int quant_mode=0, float clamp_value=0.0) -> (Tensor, Tensor, Tensor)"
)
_ascend_operators.impl("npu_swiglu_group_quant", npu_swiglu_group_quant, "CompositeExplicitAutograd")

torch.npu = npu
sys.modules["torch.npu"] = npu
