"""vLLM's quantization method "ascend" on a CPU: an emulation of vllm-ascend's layers in MXFP8 and MXFP4.

The weights are in `ascend_cpu_weights`. The description of vllm-ascend determines which layers are quantized.
Activations are quantized to MXFP8 at run time, like `npu_dynamic_mx_quant` does. Products are computed from dequantized
operands in the dtype of the activations; bfloat16 and float32 represent e4m3 and e2m1 times a power of two exactly, so
only the order of accumulation differs from an NPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, FusedMoeWeightScaleSupported, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from verl.utils.quantization.formats import ASCEND_SCHEMES, FLOAT, W4A8_MXFP, W8A8_MXFP8
from verl.utils.quantization.mxfp8 import mxfp8_dequantize, mxfp8_quantize
from verl.utils.vllm.ascend_cpu_weights import EmulatedWeights, Mxfp4Weights, Mxfp8Weights

# Names that checkpoints give an expert's projections: gate, up, down.
_EXPERT_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


class AscendCpuConfig(QuantizationConfig):
    """The per-layer description, read like vllm-ascend's `AscendModelSlimConfig` reads it.

    Args:
        description: `hf_overrides["quantization_config"]`, unchanged; see `ascend_description`.
    """

    def __init__(self, description: Mapping[str, Any]):
        super().__init__()
        self.quant_description = dict(description)

    @classmethod
    def get_name(cls) -> str:  # type: ignore[override]  # vLLM's Literal has its own methods only
        return "ascend"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AscendCpuConfig:
        return cls(config)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.quant_description = hf_to_vllm_mapper.apply_dict(self.quant_description)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            scheme = self._scheme(self._shards(prefix))
            return UnquantizedLinearMethod() if scheme == FLOAT else _LINEAR_METHODS[scheme]()
        if isinstance(layer, RoutedExperts):
            scheme = self._scheme(self._expert_keys(prefix))
            return None if scheme == FLOAT else _MOE_METHODS[scheme](layer.moe_config)
        return None

    def _shards(self, prefix: str) -> list[str]:
        parent, _, last = prefix.rpartition(".")
        shards = self.packed_modules_mapping.get(last, [last])
        return [f"{parent}.{shard}.weight" if parent else f"{shard}.weight" for shard in shards]

    def _expert_keys(self, prefix: str) -> list[str]:
        for names in _EXPERT_PROJECTIONS:
            keys = [f"{prefix}.0.{name}.weight" for name in names]
            if any(key in self.quant_description for key in keys):
                return keys
        return [f"{prefix}.weight"]

    def _scheme(self, keys: list[str]) -> str:
        missing = [key for key in keys if key not in self.quant_description]
        if missing:
            raise ValueError(f"quantization=ascend: the description has no entry {missing[0]!r}")
        kinds = {self.quant_description[key] for key in keys}
        if len(kinds) > 1 or not kinds <= {*ASCEND_SCHEMES, FLOAT}:
            raise ValueError(
                f"quantization=ascend: {', '.join(keys)} are {sorted(kinds)} in the description; they must all be "
                f"{' or all '.join((*ASCEND_SCHEMES, FLOAT))}"
            )
        return kinds.pop()


def _as_quantized(x: torch.Tensor) -> torch.Tensor:
    """Return activations [.., K] after a round trip through MXFP8."""
    return mxfp8_dequantize(*mxfp8_quantize(x), dtype=x.dtype)


class _LinearMethod(EmulatedWeights, LinearMethodBase):
    """`weight` of shape [N, K] and `weight_scale` [N, ceil(K/32)]."""

    keys = ("weight",)

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        n, k = sum(output_partition_sizes), input_size_per_partition
        if k != input_size and k % self.multiple:
            raise ValueError(
                f"quantization=ascend: {input_size} inputs give {k} per rank, which is not a multiple of "
                f"{self.multiple}; use a smaller tensor_model_parallel_size or leave the layer out"
            )
        layer._mx_compute_dtype = params_dtype
        attributes = {"input_dim": 1, "output_dim": 0} | extra_weight_attrs
        self.create_weight(layer, "weight", (n,), k, attributes, attributes)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(_as_quantized(x), layer._dequantized_weight, bias)


class AscendCpuLinearMethod(Mxfp8Weights, _LinearMethod):
    """W8A8_MXFP8."""


class AscendCpuMxfp4LinearMethod(Mxfp4Weights, _LinearMethod):
    """W4A8_MXFP."""


class _MoEMethod(EmulatedWeights, FusedMoEMethodBase):
    """`w13_weight` of shape [E, 2I, H], `w2_weight` [E, H, I], and their scales."""

    keys = ("w13_weight", "w2_weight")

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        if self.moe.has_bias or layer.activation != MoEActivation.SILU:
            raise NotImplementedError(
                f"quantization=ascend: experts with biases, or with activation={layer.activation.value}, are not "
                "supported yet: leave the layer out"
            )
        h, i = hidden_size, intermediate_size_per_partition
        layer._mx_compute_dtype = params_dtype
        attributes = {"quant_method": FusedMoeWeightScaleSupported.GROUP.value} | extra_weight_attrs
        for name, n, k in (("w13_weight", 2 * i, h), ("w2_weight", h, i)):
            self.create_weight(layer, name, (num_experts, n), k, extra_weight_attrs, attributes)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if layer.apply_router_weight_on_input:
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids.long()]
        x = _as_quantized(x)
        w13, w2 = layer._dequantized_w13_weight, layer._dequantized_w2_weight
        output = torch.zeros(x.shape[0], w2.shape[1], dtype=torch.float32)
        for expert in range(w13.shape[0]):
            rows, slots = torch.where(topk_ids == expert)
            if not len(rows):
                continue
            gate, up = F.linear(x[rows], w13[expert]).chunk(2, dim=-1)
            # No rounding to the activations' dtype between the products: on an NPU one kernel computes both.
            inner = _as_quantized(F.silu(gate.float()) * up.float()).to(x.dtype)
            product = F.linear(inner, w2[expert])
            output.index_add_(0, rows, product.float() * topk_weights[rows, slots, None].float())
        return output.to(x.dtype)


class AscendCpuMoEMethod(Mxfp8Weights, _MoEMethod):
    """W8A8_MXFP8."""


class AscendCpuMxfp4MoEMethod(Mxfp4Weights, _MoEMethod):
    """W4A8_MXFP."""


_LINEAR_METHODS = {W8A8_MXFP8: AscendCpuLinearMethod, W4A8_MXFP: AscendCpuMxfp4LinearMethod}
_MOE_METHODS = {W8A8_MXFP8: AscendCpuMoEMethod, W4A8_MXFP: AscendCpuMxfp4MoEMethod}


def register() -> None:
    """Register "ascend" on vLLM's CPU platform unless it exists: vllm-ascend's own method is never replaced."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and AscendCpuConfig.get_name() not in QUANTIZATION_METHODS:
        register_quantization_config(AscendCpuConfig.get_name())(AscendCpuConfig)
