"""A blocked model raises in every way in which vLLM runs a step."""

import pytest
import torch
from torch import nn

from verl.workers.rollout.vllm_rollout.serving_block import ServingBlock
from verl.workers.weight_sync.manifest import WeightUpdateError


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x)

    def compute_logits(self, hidden):
        return hidden + 1


class Graph:
    """A captured graph as vLLM wraps it: it is replayed without a call of the model, and forwards attributes."""

    def __init__(self, model):
        self.model = model

    def __call__(self, x):
        return torch.zeros(2)

    def __getattr__(self, name):
        return getattr(self.model, name)


def test_blocked_model_refuses_every_step_and_computes_again_afterwards():
    model, x = Model(), torch.ones(3)
    block, graph = ServingBlock(model), Graph(model)
    expected = model(x)
    for _ in range(2):
        block.set("first")
        block.set("reason of the test")
        with pytest.raises(WeightUpdateError, match="refuses to serve: reason of the test"):
            model(x)
        with pytest.raises(WeightUpdateError, match="refuses to serve: reason of the test"):
            graph.compute_logits(graph(x))
        block.clear()
        block.clear()
        assert torch.equal(model(x), expected) and graph.compute_logits(1) == 2
    assert not model._forward_pre_hooks and "compute_logits" not in vars(model)
