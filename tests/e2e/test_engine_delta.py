"""A delta update leaves a running engine with the same bits as a full update, at each of twenty steps.

The independent reference is the full update, which uses the engine's own loaders and layouts: after every delta the
test takes the hashes of all parameters, sends the same weights in full, and compares the hashes.
"""

import pytest
import torch

from fixtures.deltas import OneBucketDelta, nudged
from fixtures.engine import weights_of
from verl.config import RolloutConfig
from verl.workers.weight_sync.manifest import WeightUpdateError

pytestmark = pytest.mark.e2e

STEPS = 20
MERGE, FROZEN = 4, range(8, 12)


def encoded(scheme, weights, dtype):
    return {name: t.contiguous() for name, t in scheme.encode((n, w.to(dtype)) for n, w in weights.items())}


def send_delta(engine, old, new, version):
    changes = OneBucketDelta(old, new, version)
    engine.checked("verl_begin_update", version, engine.quantization, version - 1)
    engine.checked("verl_load_bucket", changes.bucket)
    return engine.checked("verl_finish_update", changes.manifest)


def stepped(weights, step):
    """Weights after a step. Some steps train a part: an adapter is merged and removed again; a layer is frozen."""
    moved = nudged(weights, step)
    if step == MERGE:
        return {name: moved[name] if "o_proj" in name else weight for name, weight in weights.items()}
    if step == MERGE + 1:
        back = nudged(weights, MERGE, size=-2e-5)
        return {name: back[name] if "o_proj" in name else weight for name, weight in weights.items()}
    if step in FROZEN:
        return {name: weight if "layers.1." in name else moved[name] for name, weight in weights.items()}
    return moved


def twenty_steps(engine, scheme, weights, dtype):
    """Send a delta and a full update for each step, and compare the engine after both; return the last version."""
    sent = encoded(scheme, weights, dtype)
    version, accepts_delta = 0, False
    while not accepts_delta:
        accepts_delta = engine.update(sent.items(), version)[0]["accepts_delta"]
        version += 1
        assert version <= 2
    addresses = engine.rpc("verl_parameter_addresses")
    moved, computed = 0, torch.empty(0)
    for step in range(STEPS):
        before = engine.rpc("verl_parameter_hashes")
        weights, old = stepped(weights, step), sent
        sent = encoded(scheme, weights, dtype)
        send_delta(engine, old, sent, version)
        assert engine.llm.reset_prefix_cache()
        hashes = engine.rpc("verl_parameter_hashes")
        responses, log_probs = engine.sample(4)
        # Weights that a layer has packed for its kernel are not parameters: a change of those shows in the output.
        moved += hashes != before or not torch.equal(log_probs, computed)
        computed = log_probs
        engine.update(sent.items(), version + 1)
        assert engine.rpc("verl_parameter_hashes") == hashes
        # The same holds for values that layers derive from their parameters.
        full_responses, full_log_probs = engine.sample(4)
        assert responses == full_responses
        torch.testing.assert_close(log_probs, full_log_probs, rtol=0, atol=0)
        version += 2
    assert moved == STEPS
    assert engine.rpc("verl_parameter_addresses") == addresses
    return version


ODD = {"hidden_size": 96, "intermediate_size": 192, "moe_intermediate_size": 192}
# The engine pads this vocabulary too; it makes such a table after all other weights.
PARTIAL = {"hidden_size": 96, "intermediate_size": 80, "vocab_size": 100}
RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
CASES = {
    "experts, packed by the engine": (None, "qwen3_moe", True, {}, {"dtype": "bfloat16"}),
    "dense, tied, in MXFP8": ("ascend", "qwen3", True, PARTIAL, {}),
    "experts, in MXFP8, on two ranks": ("ascend", "qwen3_moe", False, ODD, RANKS),
    "dense, packed by the engine": (None, "llama", False, {}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_twenty_delta_updates_equal_full_updates(tiny_models, engines, case):
    quantization, kind, tied, sizes, over = CASES[case]
    (model_dir,) = tiny_models(1, kind=kind, tied=tied, std=0.02, **sizes)
    rollout = RolloutConfig(quantization=quantization, tensor_model_parallel_size=over.get("tensor_parallel_size", 1))
    engine, scheme = engines.get(model_dir, rollout, **over)
    version = twenty_steps(engine, scheme, weights_of(model_dir), getattr(torch, over.get("dtype", "float32")))
    with pytest.raises(WeightUpdateError, match="a delta against version 3: the engine serves version"):
        engine.checked("verl_begin_update", version, engine.quantization, 3)
