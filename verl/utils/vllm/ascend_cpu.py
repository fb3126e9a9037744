"""vLLM's quantization method "ascend" on a CPU: an emulation of vllm-ascend's MXFP8 layers.

Parameters have the names, dtypes and layouts of vllm-ascend's (see `vllm_fp8_utils`, whose hooks reload them). The same
description determines which layers are quantized. Activations are quantized at run time, like `npu_dynamic_mx_quant`
does. Products are computed from dequantized operands in the dtype of the activations; bfloat16 and float32 represent
e4m3 times a power of two exactly, so only the order of accumulation differs from an NPU.

Memory: each weight is kept twice, as MXFP8 (1 1/32 bytes per weight) and dequantized (2 or 4 bytes), once per update.
Dequantizing in every step would cost many times the product of a small batch.
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
from vllm.model_executor.utils import set_weight_attrs

from verl.utils.quantization.formats import FLOAT, MX_BLOCK_SIZE, W8A8_MXFP8
from verl.utils.quantization.mx import mxfp8_dequantize, mxfp8_quantize
from verl.utils.vllm.vllm_fp8_utils import MXFP8Layer, record_kernel_layout, scales_in_checkpoint_layout

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
            return AscendCpuLinearMethod() if self._is_quantized(self._shards(prefix)) else UnquantizedLinearMethod()
        if isinstance(layer, RoutedExperts) and self._is_quantized(self._expert_keys(prefix)):
            return AscendCpuMoEMethod(layer.moe_config)
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

    def _is_quantized(self, keys: list[str]) -> bool:
        missing = [key for key in keys if key not in self.quant_description]
        if missing:
            raise ValueError(f"quantization=ascend: the description has no entry {missing[0]!r}")
        kinds = {self.quant_description[key] for key in keys}
        if len(kinds) > 1 or not kinds <= {W8A8_MXFP8, FLOAT}:
            raise ValueError(
                f"quantization=ascend: {', '.join(keys)} are {sorted(kinds)} in the description; they must all be "
                f"{W8A8_MXFP8} or all {FLOAT}"
            )
        return kinds == {W8A8_MXFP8}


def _parameter(layer: nn.Module, name: str, shape: tuple[int, ...], dtype: torch.dtype, **attributes: Any) -> None:
    parameter = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
    layer.register_parameter(name, parameter)
    set_weight_attrs(parameter, attributes)


def _groups(k: int) -> int:
    return -(-k // MX_BLOCK_SIZE)


def _to_kernel_layout(layer: MXFP8Layer, keys: tuple[str, ...]) -> None:
    """Transform a layer for the first time. `apply_mxfp8_transformation_after_loading` does it later."""
    if getattr(layer, "_mxfp8_transformed", False):
        return
    shapes: dict[str, tuple[int, ...]] = {}
    for key in keys:
        weight, scale = getattr(layer, key), getattr(layer, f"{key}_scale")
        shapes |= {key: tuple(weight.shape), f"{key}_scale": tuple(scale.shape)}
        padded = F.pad(scale.data, (0, scale.shape[-1] % 2))
        scale.data = padded.unflatten(-1, (-1, 2)).transpose(-2, -3).contiguous()
        # A view: new weights are loaded and dequantized row by row in the underlying memory.
        weight.data = weight.data.transpose(-1, -2)
    record_kernel_layout(layer, shapes)


def _dequantized(layer: nn.Module, key: str, dtype: torch.dtype, out: torch.Tensor | None) -> torch.Tensor:
    """Return a weight [.., N, K] in its compute dtype, from its kernel layout."""
    values = getattr(layer, key).data.transpose(-1, -2).contiguous()
    scales = scales_in_checkpoint_layout(getattr(layer, f"{key}_scale").data, _groups(values.shape[-1]))
    return mxfp8_dequantize(values, scales.contiguous(), dtype, out=out)


def _as_quantized(x: torch.Tensor) -> torch.Tensor:
    """Return activations [.., K] after a round trip through MXFP8."""
    return mxfp8_dequantize(*mxfp8_quantize(x), dtype=x.dtype)


class _Dequantizing:
    """Keeps the dequantized weights of a layer and recomputes them after each update.

    Layers are `Any`: the methods below set and read attributes that no class declares.
    """

    keys: tuple[str, ...]

    def process_weights_after_loading(self, layer: Any) -> None:
        _to_kernel_layout(layer, self.keys)
        self.refresh_after_loading(layer)

    def refresh_after_loading(self, layer: Any) -> None:
        for key in self.keys:
            name = f"_dequantized_{key}"
            made = _dequantized(layer, key, layer._mxfp8_compute_dtype, layer.__dict__.get(name))
            # Bypasses nn.Module.__setattr__: this tensor is derived from the parameters and must not become one.
            layer.__dict__[name] = made

    def refresh_after_delta(self, layer: Any, indices: Mapping[str, torch.Tensor]) -> None:
        """Dequantize the blocks with changed elements.

        Args:
            indices: by parameter, int64 indices into the flattened parameter in checkpoint layout.
        """
        for key in self.keys:
            shape = layer._mxfp8_original_shapes[key]
            k, groups = shape[-1], _groups(shape[-1])
            blocks = [indices[f"{key}_scale"]] if f"{key}_scale" in indices else []
            if key in indices:
                row = torch.div(indices[key], k, rounding_mode="floor")
                blocks.append(row * groups + torch.div(indices[key] - row * k, MX_BLOCK_SIZE, rounding_mode="floor"))
            if not blocks:
                continue
            changed = torch.cat(blocks).unique()
            made = layer.__dict__[f"_dequantized_{key}"]
            if k % MX_BLOCK_SIZE or len(changed) > made.numel() // MX_BLOCK_SIZE // 2:
                _dequantized(layer, key, layer._mxfp8_compute_dtype, made)
                continue
            weight, scale = getattr(layer, key).data, getattr(layer, f"{key}_scale").data
            values = weight.transpose(-1, -2).contiguous().view(torch.uint8).view(-1, MX_BLOCK_SIZE)[changed]
            scales = scales_in_checkpoint_layout(scale, groups).flatten()[changed]
            fresh = mxfp8_dequantize(values.view(torch.float8_e4m3fn), scales[:, None], made.dtype)
            made.view(-1, MX_BLOCK_SIZE)[changed] = fresh


class AscendCpuLinearMethod(_Dequantizing, LinearMethodBase):
    """`weight` [N, K] float8_e4m3fn and `weight_scale` [N, ceil(K/32)] uint8, in checkpoint layout."""

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
        if k != input_size and k % MX_BLOCK_SIZE:
            raise ValueError(
                f"quantization=ascend: {input_size} inputs give {k} per rank, which is not a multiple of "
                f"{MX_BLOCK_SIZE}; use a smaller tensor_model_parallel_size or leave the layer out"
            )
        layer._mxfp8_compute_dtype = params_dtype
        attributes = {"input_dim": 1, "output_dim": 0} | extra_weight_attrs
        _parameter(layer, "weight", (n, k), torch.float8_e4m3fn, **attributes)
        _parameter(layer, "weight_scale", (n, _groups(k)), torch.uint8, **attributes)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(_as_quantized(x), layer._dequantized_weight, bias)


class AscendCpuMoEMethod(_Dequantizing, FusedMoEMethodBase):
    """`w13_weight` [E, 2I, H], `w2_weight` [E, H, I] float8_e4m3fn and their uint8 scales, in checkpoint layout."""

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
        layer._mxfp8_compute_dtype = params_dtype
        attributes = {"quant_method": FusedMoeWeightScaleSupported.GROUP.value} | extra_weight_attrs
        for name, n, k in (("w13_weight", 2 * i, h), ("w2_weight", h, i)):
            _parameter(layer, name, (num_experts, n, k), torch.float8_e4m3fn, **extra_weight_attrs)
            _parameter(layer, f"{name}_scale", (num_experts, n, _groups(k)), torch.uint8, **attributes)

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


def register() -> None:
    """Register "ascend" on vLLM's CPU platform unless it exists: vllm-ascend's own method is never replaced."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and AscendCpuConfig.get_name() not in QUANTIZATION_METHODS:
        register_quantization_config(AscendCpuConfig.get_name())(AscendCpuConfig)
