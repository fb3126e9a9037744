"""Forward passes of a release's model on the CPU, without its attention kernels.

Import it only in an environment of `build_env.py`.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention


def _causal(self, query, key, value, output_shape=None):
    """Compute causal attention over one sequence from its first token: no cache, no batches."""
    heads, kv_heads, size = self.num_heads, self.num_kv_heads, self.head_size
    q, k, v = (
        tensor.view(-1, count, size).transpose(0, 1)
        for tensor, count in ((query, heads), (key, kv_heads), (value, kv_heads))
    )
    k, v = (tensor.repeat_interleave(heads // kv_heads, 0) for tensor in (k, v))
    output = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return output.transpose(0, 1).flatten(1)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Replace the forward pass of vLLM's attention layers by scaled dot products."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Attention, "forward", _causal)
        yield


def in_float32(model: nn.Module) -> nn.Module:
    """Convert unquantized parameters, and so all activations, to float32: bfloat16 would round between layers.

    The release rejects such a configuration, but its layers and the operators' stand-ins support float32.
    """
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
    for layer in model.modules():
        if hasattr(layer, "cos_sin_cache"):
            layer.cos_sin_cache = layer._compute_cos_sin_cache()
    return model


@torch.no_grad()
def log_probs(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities [tokens, vocabulary] after each token of one sequence."""
    with plain_attention():
        hidden = model(ids, torch.arange(len(ids)))
    # The head's method needs an operator of vLLM's compiled code, which computes this product.
    return torch.log_softmax(nn.functional.linear(hidden, model.lm_head.weight).double(), -1)


def expert_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that hold the parameters of experts, by the name of their module."""
    return {
        name.removesuffix(".routed_experts"): layer
        for name, layer in model.named_modules()
        if "w13_weight" in layer._parameters
    }


# Attributes of the release's own layer class from 0.27 on: one rank without padding, masks or redundant experts.
_OWN_LAYER = {
    "ascend_expert_map": None,
    "ascend_mc2_mask": None,
    "ascend_pertoken_scale": None,
    "global_redundant_expert_num": 0,
    "apply_router_weight_on_input": False,
}


def complete_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Set what the release's model runner and layer class set, and return the layers with experts by module name."""
    from vllm_ascend import utils
    from vllm_ascend.ascend_config import get_ascend_config

    layers = expert_layers(model)
    if layers and hasattr(utils, "set_weight_prefetch_method"):  # before 0.26
        utils.set_weight_prefetch_method(get_ascend_config().weight_prefetch_config)
    for layer in layers.values():
        if getattr(layer, "swiglu_limit", None) is None:
            layer.swiglu_limit = 0
        if "topk_ids" in inspect.signature(layer.quant_method.apply).parameters:
            for name, value in _OWN_LAYER.items():
                setattr(layer, name, value)
    return layers
