"""Expert parallelism for vLLM's unquantized experts on a CPU.

Each rank holds some of the experts, and `expert_map` gives their indices on the rank. vLLM's CPU experts ignore it
(0.32), so their kernel would read the weights of experts that the rank does not have.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from verl.utils.vllm.replace_method import replace_method


def mapping_experts(apply: Callable[..., None]) -> Callable[..., None]:
    """Wrap `CPUUnquantizedExperts.apply` so that the output is the sum over the rank's own experts.

    For the kernel, an expert of another rank is expert 0 with weight 0. vLLM sums the outputs of all ranks afterwards.
    """

    @functools.wraps(apply)
    def wrapper(self: Any, *, expert_map: torch.Tensor | None, **arguments: Any) -> None:
        if expert_map is None:
            apply(self, expert_map=None, **arguments)
            return
        local = expert_map[arguments["topk_ids"].long()]
        elsewhere = local < 0
        arguments["topk_ids"] = local.masked_fill(elsewhere, 0).to(arguments["topk_ids"].dtype)
        arguments["topk_weights"] = arguments["topk_weights"].masked_fill(elsewhere, 0)
        apply(self, expert_map=expert_map, **arguments)
        if arguments["apply_router_weight_on_input"]:
            # Each token has one expert, and the input contains its weight already.
            arguments["output"].masked_fill_(elsewhere, 0)

    return wrapper


def register() -> None:
    """Wrap the method once. vLLM before 0.32 has no such class."""
    try:
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    except ImportError:
        return
    replace_method(CPUUnquantizedExperts, "apply", mapping_experts)
