"""A real vLLM engine whose weights are split between two worker processes."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from fixtures.delta_steps import check_delta_steps
from fixtures.engine import log_probs_of, weights_of
from fixtures.fake_quant import check_equal_up_to_rounding, fake_quantized
from verl.config import RolloutConfig
from verl.workers.weight_sync.manifest import WeightUpdateError

pytestmark = pytest.mark.e2e

ROLLOUT = RolloutConfig(quantization="ascend", tensor_model_parallel_size=2)
# Each rank has an odd number of groups of every weight that is split.
SIZES = {
    "qwen3": {},
    "qwen3_moe": {"hidden_size": 96, "intermediate_size": 192, "moe_intermediate_size": 192},
}


@pytest.fixture
def start(tiny_models, engines):
    """`start(kind)`: directories of two models, an engine on two ranks, and its quantization scheme."""

    def start(kind):
        directories = tiny_models(2, kind=kind, tied=False, std=0.02, **SIZES[kind])
        ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
        return directories, *engines.get(directories[0], ROLLOUT, **ranks)

    return start


def test_twenty_delta_updates_equal_full_updates_on_two_ranks(start):
    (first, _), engine, scheme = start("qwen3_moe")
    check_delta_steps(engine, scheme, weights_of(first), torch.float32, steps=20)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_two_ranks_hold_their_shares(start, kind):
    """The worker processes find the method "ascend" through the entry point vllm.general_plugins."""
    (first, second), engine, scheme = start(kind)
    addresses = engine.rpc("verl_parameter_addresses")
    for source in (second, first, second):
        engine.update(scheme.encode(weights_of(source).items()), bucket_bytes=20_000)
        engine.checked("verl_check_engine", engine.quantization, True)  # the self-test: passes, and changes nothing
        responses, log_probs = engine.sample()
        check_equal_up_to_rounding(log_probs, log_probs_of(fake_quantized(source), responses))
        assert engine.rpc("verl_parameter_addresses") == addresses


@pytest.mark.parametrize("quantization", ["ascend", None])
def test_each_rank_holds_whole_experts(tiny_models, engines, quantization):
    """The 96 inputs of an expert are three blocks, which tensor parallelism would cut in the middle."""
    first, second = tiny_models(2, kind="qwen3_moe", tied=False, std=0.02, moe_intermediate_size=96)
    rollout = RolloutConfig(quantization=quantization, tensor_model_parallel_size=2, expert_parallel_size=2)
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "enable_expert_parallel": True}
    engine, scheme = engines.get(first, rollout, **ranks)
    for source in (second, first):
        engine.update(scheme.encode(weights_of(source).items()), bucket_bytes=20_000)
        responses, log_probs = engine.sample()
        if quantization is None:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
            torch.testing.assert_close(log_probs, log_probs_of(model, responses), rtol=0, atol=1e-5)
        else:
            check_equal_up_to_rounding(log_probs, log_probs_of(fake_quantized(source), responses))
    check_delta_steps(engine, scheme, weights_of(first), torch.float32, steps=6)


@pytest.mark.parametrize("experts", ["split", "distributed"])
def test_tensors_that_no_rank_uses_are_refused(tiny_models, engines, experts):
    """With expert parallelism, each rank skips the experts of the other one."""
    (source,) = tiny_models(1, kind="qwen3_moe", tied=False, attention_bias=True)
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    over = {"enable_expert_parallel": True} if experts == "distributed" else {}
    engine, _ = engines.get(source, dtype="bfloat16", **ranks, **over)
    weights = weights_of(source)
    dropped = [name for name in weights if name.endswith("o_proj.bias")]
    assert dropped, "the model has no tensor that the engine drops"
    with pytest.raises(WeightUpdateError, match=f"no place for {len(dropped)} tensors .*: {dropped[0]}"):
        engine.update(weights.items(), dtype=torch.bfloat16)
    engine.update(((name, weight) for name, weight in weights.items() if name not in dropped), dtype=torch.bfloat16)
