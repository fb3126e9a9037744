"""The output of quantized experts outside a forward pass of the engine, without communication between ranks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

import torch


@torch.no_grad()
def experts_output(layer: Any, vllm_config: Any, x: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
    """Apply a layer's own quantization method to tokens, before any reduction over tensor-parallel ranks.

    Up to 0.26 vllm-ascend's method chooses the experts, later ones and the emulation on a CPU get the choice. Both
    times it is softmax, the layer's number of experts per token, and weights that sum to one.

    Args:
        layer: the layer with the experts' parameters, in kernel layout. All experts are on this rank.
        vllm_config: the engine's `VllmConfig`.
        x: tokens [M, H] in the engine's dtype.
        router_logits: [M, E].

    Returns:
        [M, H] in the dtype of `x`.
    """
    method, top_k = layer.quant_method, layer.moe_config.experts_per_token
    accepted = inspect.signature(method.apply).parameters
    x = x.clone()  # vllm-ascend frees its input
    # vllm-ascend's method needs a context; the emulation, which has no scheme inside its method, needs none.
    with _local_experts(layer, vllm_config) if hasattr(method, "quant_method") else nullcontext():
        if "topk_ids" in accepted:
            weights, experts = router_logits.float().softmax(-1).topk(top_k, dim=-1)
            weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
            output = method.apply(layer, x, weights, experts.to(torch.int32))
        else:
            count = next(name for name in ("num_experts", "global_num_experts") if name in accepted)
            options = {"top_k": top_k, "renormalize": True, count: router_logits.shape[1]}
            output = method.apply(layer, x, router_logits, **options)
    return getattr(output, "routed_out", output)


@contextmanager
def _local_experts(layer: Any, vllm_config: Any) -> Iterator[None]:
    """Set a forward context in which vllm-ascend dispatches tokens within this rank."""
    from vllm.config import set_current_vllm_config
    from vllm.forward_context import set_forward_context

    with set_current_vllm_config(vllm_config), set_forward_context(None, vllm_config):
        context = import_module("vllm_ascend.ascend_forward_context")
        dispatch = import_module("vllm_ascend.ops.fused_moe.moe_comm_method").AllGatherCommImpl
        context._EXTRA_CTX.moe_comm_type = context.MoECommType.ALLGATHER
        context._EXTRA_CTX.moe_comm_method = dispatch(layer.moe_config)
        yield
