"""The backend "verl" of vLLM's weight transfer in an engine with two worker processes."""

import pytest

from fixtures.engine import weights_of
from fixtures.transfer_client import BACKEND, Client
from verl.config import RolloutConfig

pytestmark = pytest.mark.e2e

ROLLOUT = RolloutConfig(quantization="ascend", tensor_model_parallel_size=2, expert_parallel_size=2)
RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "enable_expert_parallel": True}
EXPERT = "model.layers.1.mlp.experts.0.up_proj.weight"  # held by the first worker


def test_workers_agree_on_an_update_and_on_a_refusal(tiny_models, engines):
    """Each worker holds its share of the attention and its experts, so one worker alone lacks a missing expert."""
    first, second = tiny_models(2, kind="qwen3_moe", tied=False, std=0.02)
    engine, scheme = engines.get(first, ROLLOUT, **RANKS, **BACKEND)
    client = Client(engine, quantization="ascend", quantization_side="receiver")
    weights = weights_of(second)
    for _ in range(2):
        client.update(weights_of(first).items())
        with pytest.raises(RuntimeError, match=r"worker 0: .*layers\.1\.mlp\.experts.*serves nothing"):
            client.update((name, tensor) for name, tensor in weights.items() if name != EXPERT)
        with pytest.raises(RuntimeError, match="without a matching start"):
            client.llm.finish_weight_update()
    client.update(weights.items())
    ours = engine.rpc("verl_parameter_hashes")
    engine.sample(4)
    engine.update(scheme.encode(weights_of(first).items()))
    assert engine.rpc("verl_parameter_hashes") != ours
    engine.update(scheme.encode(weights.items()))
    assert engine.rpc("verl_parameter_hashes") == ours
