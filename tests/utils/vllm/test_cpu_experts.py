"""Experts on several ranks of a CPU: the ranks' outputs add up to that of all experts."""

import pytest
import torch

from verl.utils.vllm.cpu_experts import mapping_experts

TOKENS, EXPERTS, HIDDEN = 7, 6, 5


def apply(self, *, output, hidden_states, w1, topk_weights, topk_ids, expert_map, apply_router_weight_on_input):
    """Stand-in for vLLM's kernel, which ignores `expert_map`: one matrix per expert."""
    products = torch.einsum("th,tkoh->tko", hidden_states, w1[topk_ids.long()])
    weights = torch.ones_like(topk_weights) if apply_router_weight_on_input else topk_weights
    output.copy_((products * weights[..., None]).sum(1))


def output_of(x, w1, weights, ids, expert_map, on_input):
    output = torch.full((TOKENS, HIDDEN), torch.nan)
    mapping_experts(apply)(
        None,
        output=output,
        hidden_states=x * weights if on_input else x,
        w1=w1,
        topk_weights=weights,
        topk_ids=ids,
        expert_map=expert_map,
        apply_router_weight_on_input=on_input,
    )
    return output


@pytest.mark.parametrize("on_input", [False, True], ids=["weighted outputs", "weighted inputs"])
def test_ranks_add_up_to_all_experts(on_input):
    generator = torch.Generator().manual_seed(0)
    x, w1 = torch.randn(TOKENS, HIDDEN, generator=generator), torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=generator)
    chosen = torch.rand(TOKENS, EXPERTS, generator=generator).topk(1 if on_input else 3)
    weights, ids = chosen.values, chosen.indices.int()
    expected = torch.zeros(TOKENS, HIDDEN)
    for token in range(TOKENS):
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            expected[token] += weight * (w1[expert] @ x[token])
    torch.testing.assert_close(output_of(x, w1, weights, ids, None, on_input), expected)
    # Ranks with other numbers of experts than two halves.
    total = torch.zeros(TOKENS, HIDDEN)
    for held in ([4, 1], [0, 2, 3, 5]):
        expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32)
        expert_map[held] = torch.arange(len(held), dtype=torch.int32)
        before = ids.clone(), weights.clone()
        total += output_of(x, w1[held], weights, ids, expert_map, on_input)
        assert torch.equal(ids, before[0]) and torch.equal(weights, before[1])
    torch.testing.assert_close(total, expected)
