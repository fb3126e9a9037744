"""Changes written into a running engine leave it, bit for bit, as a whole update would, after each of twenty of them.

The independent reference is the whole update itself, through the engine's own loaders and layouts: after every delta
the hashes of all parameters are taken, the same weights are sent whole, and the hashes have to be the same.
"""

import pytest
import torch

from fixtures.deltas import Changes, nudged
from fixtures.engine import Engine, weights_of
from fixtures.tiny import write_tiny_model
from verl.config import RolloutConfig
from verl.utils.vllm import plugin
from verl.workers.rollout.quantization import get_scheme
from verl.workers.weight_sync.manifest import WeightUpdateError

pytestmark = pytest.mark.e2e

STEPS = 20
MERGE, FROZEN = 4, range(8, 12)


def encoded(scheme, weights, dtype):
    return {name: t.contiguous() for name, t in scheme.encode((n, w.to(dtype)) for n, w in weights.items())}


def send_changes(engine, old, new, version):
    changes = Changes(old, new, version)
    engine.checked("verl_begin_update", version, engine.quantization, version - 1)
    engine.checked("verl_load_bucket", changes.bucket)
    return engine.checked("verl_finish_update", changes.manifest)


def stepped(weights, step):
    """Some steps train a part: adapters are merged into a projection, then taken out; a layer is frozen for a while."""
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
    """Every other delta follows a delta; after each, hashes are compared with a whole update's."""
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
        send_changes(engine, old, sent, version)
        assert engine.llm.reset_prefix_cache()
        hashes = engine.rpc("verl_parameter_hashes")
        derived = engine.sample(4)
        # What a layer packed for its kernel is no parameter any more.
        moved += hashes != before or not torch.equal(derived[1], computed)
        computed = derived[1]
        engine.update(sent.items(), version + 1)
        assert engine.rpc("verl_parameter_hashes") == hashes
        # What layers derive from their parameters is no parameter: it shows in what they compute.
        assert derived[0] == engine.sample(4)[0]
        torch.testing.assert_close(derived[1], engine.sample(4)[1], rtol=0, atol=0)
        version += 2
    assert moved == STEPS
    assert engine.rpc("verl_parameter_addresses") == addresses
    return version


ODD = {"hidden_size": 96, "intermediate_size": 192, "moe_intermediate_size": 192}
# A vocabulary that the engine pads, besides: such a table is made last of all.
PARTIAL = {"hidden_size": 96, "intermediate_size": 80, "vocab_size": 100}
RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
CASES = {
    "dense, tied, in MXFP8": ("ascend", "qwen3", True, PARTIAL, {}),
    "experts, in MXFP8, on two ranks": ("ascend", "qwen3_moe", False, ODD, RANKS),
    "dense, packed by the engine": (None, "llama", False, {}, {}),
    "experts, packed by the engine": (None, "qwen3_moe", True, {}, {"dtype": "bfloat16"}),
}


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_of_changes_leave_what_whole_updates_leave(tmp_path, monkeypatch, case):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    quantization, kind, tied, sizes, over = CASES[case]
    model_dir = write_tiny_model(tmp_path / "model", kind=kind, tied=tied, std=0.02, **sizes)
    rollout = RolloutConfig(quantization=quantization, tensor_model_parallel_size=over.get("tensor_parallel_size", 1))
    plugin.register()
    scheme = get_scheme(rollout, str(model_dir))
    engine = Engine(model_dir, rollout, **scheme.engine_overrides("cpu"), **over)
    try:
        version = twenty_steps(engine, scheme, weights_of(model_dir), getattr(torch, over.get("dtype", "float32")))
        with pytest.raises(WeightUpdateError, match="a delta to version 3 arrived, the engine has version"):
            engine.checked("verl_begin_update", version, engine.quantization, 3)
    finally:
        engine.close()
