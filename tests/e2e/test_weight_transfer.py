"""The backend "verl" of vLLM's weight transfer: the engine holds the bytes of verl's own update, or serves nothing."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fixtures.engine import log_probs_of, weights_of
from fixtures.fake_quant import check_equal_up_to_rounding, fake_quantized
from fixtures.transfer_client import BACKEND, Client
from verl.config import RolloutConfig

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
ROLLOUT = RolloutConfig(quantization="ascend", tensor_model_parallel_size=1)
SIZES = {"hidden_size": 96, "intermediate_size": 160}


def refuses_to_serve(engine):
    """Run a step as vLLM's model runner does. (`generate` would leave its requests in the engine.)"""
    with pytest.raises(RuntimeError, match="the engine refuses to serve"):
        engine.model(input_ids=torch.zeros(1, dtype=torch.long), positions=torch.zeros(1, dtype=torch.long))
    return True


@pytest.mark.parametrize("side", ["sender", "receiver"])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_parameters_equal_those_of_our_own_update(tiny_models, engines, kind, side):
    sizes = SIZES | ({"moe_intermediate_size": 96} if kind == "qwen3_moe" else {})
    first, second = tiny_models(2, kind=kind, tied=True, std=0.02, dtype="bfloat16", **sizes)
    engine, scheme = engines.get(first, ROLLOUT, **BACKEND)
    own, _ = engines.get(first, ROLLOUT)
    client = Client(engine, quantization="ascend", quantization_side=side)
    addresses = engine.rpc("verl_parameter_addresses")
    for source in (second, first, second):
        weights = weights_of(source)
        client.update(scheme.encode(weights.items()) if side == "sender" else weights.items())
        own.update(scheme.encode(weights.items()))
        assert engine.rpc("verl_parameter_hashes") == own.rpc("verl_parameter_hashes")
        assert engine.rpc("verl_parameter_addresses") == addresses
        responses, log_probs = engine.sample()
        check_equal_up_to_rounding(log_probs, log_probs_of(fake_quantized(source), responses))
        assert engine.llm.get_weight_version() == str(client.version)


def test_unquantized_engine_is_updated_too(tiny_models, engines):
    first, second = tiny_models(2, kind="qwen3", tied=True)
    engine, _ = engines.get(first, **BACKEND)
    own, _ = engines.get(first)
    client = Client(engine)
    for source in (second, first):
        client.update(weights_of(source).items())
        own.update(weights_of(source).items())
        assert engine.rpc("verl_parameter_hashes") == own.rpc("verl_parameter_hashes")
    weights = weights_of(second)
    with pytest.raises(RuntimeError, match=f"no place for 1 tensors.*{EXTRA}.*serves nothing"):
        client.update([*weights.items(), (EXTRA, weights[NORM])])


O_PROJ, NORM, EXTRA = (
    "model.layers.1.self_attn.o_proj.weight",
    "model.norm.weight",
    "model.layers.1.self_attn.o_proj.bias",
)
FAULTS = {
    "a missing weight": (lambda w: {k: t for k, t in w.items() if k != O_PROJ}, r"layers\.1\.self_attn\.o_proj"),
    "a missing norm": (lambda w: {k: t for k, t in w.items() if k != NORM}, r"model\.norm\.weight"),
    "a weight of another shape": (lambda w: w | {O_PROJ: w[O_PROJ][:-1].clone()}, O_PROJ),
    "NaN": (lambda w: w | {O_PROJ: torch.full_like(w[O_PROJ], float("nan"))}, f"{O_PROJ}.*NaN"),
    "a tensor without a place": (lambda w: w | {EXTRA: w[NORM]}, rf"{EXTRA}' is not in the checkpoint"),
    "another dtype": (lambda w: w | {NORM: w[NORM].double()}, f"{NORM}.*the engine holds it in float32"),
}


@pytest.fixture
def running(tiny_models, engines):
    """An engine that serves the first of two models, its client, and the weights of both models."""
    first, second = tiny_models(2, kind="qwen3", tied=True, std=0.02, **SIZES)
    engine, _ = engines.get(first, ROLLOUT, **BACKEND)
    client = Client(engine, quantization="ascend", quantization_side="receiver")
    client.update(weights_of(first).items())
    return engine, client, weights_of(first), weights_of(second)


def test_refused_update_is_named_and_nothing_is_served_until_a_full_one_succeeds(running):
    engine, client, first, second = running
    served = engine.rpc("verl_parameter_hashes")
    for change, message in FAULTS.values():
        with pytest.raises(Exception, match=rf"{message}.*serves nothing until a full update succeeds"):
            client.update(change(second).items())
        assert refuses_to_serve(engine)
    client.update(first.items())
    assert engine.rpc("verl_parameter_hashes") == served
    engine.sample(4)


def test_order_of_the_calls_is_checked(running):
    engine, client, first, second = running
    with pytest.raises(Exception, match="start_weight_update must be called"):
        client.call(manifest={"version": 1, "num_buckets": 0, "specs": []})
    engine.sample(4)  # nothing was touched
    client.send(second.items())
    assert refuses_to_serve(engine)
    with pytest.raises(Exception, match="before a manifest was accepted"):
        client.llm.finish_weight_update()
    # vLLM still takes the update for open: any call of update_weights closes it.
    with pytest.raises(Exception, match=r"no weight update is open.*serves nothing"):
        client.call(manifest=client.sender.manifest())
    assert refuses_to_serve(engine)
    manifest = client.send(second.items())
    with pytest.raises(Exception, match=r"received \d+ of \d+ buckets"):
        client.call(manifest=manifest | {"num_buckets": manifest["num_buckets"] + 1})
    for message in ({"bucket": {}}, {}, {"weights": 1}):
        client.llm.start_weight_update()
        with pytest.raises(Exception, match=r"missing key|one of the keys|unexpected keyword"):
            client.call(**message)
        assert refuses_to_serve(engine)
    client.update(first.items())
    engine.sample(4)


def test_settings_that_do_not_fit_the_engine_are_refused(running):
    _, client, _, _ = running
    for info, message in (
        ({}, "init_info.quantization=None: the engine was started with quantization='ascend'"),
        ({"quantization": "ascend", "side": "sender"}, "unexpected keyword argument 'side'"),
        ({"quantization": "ascend", "quantization_config_file": "/no/such/file.json"}, "/no/such/file.json"),
    ):
        with pytest.raises(Exception, match=re.escape(message)):
            client.llm.init_weight_transfer_engine({"init_info": info})


def test_engine_with_random_weights_serves_nothing_before_the_first_update(tiny_models, engines):
    (first,) = tiny_models(1, kind="qwen3", tied=True, std=0.02, hidden_size=32)
    engine, _ = engines.get(first, ROLLOUT, **BACKEND)
    client = Client(engine, quantization="ascend", quantization_side="receiver")
    assert refuses_to_serve(engine)
    client.update(weights_of(first).items())
    engine.sample(4)


def test_generation_after_a_refused_update_fails_with_its_reason(tiny_models, engines):
    first, second = tiny_models(2, kind="qwen3", tied=True, std=0.02, **SIZES)
    engine, _ = engines.get(first, ROLLOUT, **BACKEND, max_num_seqs=8)  # no other test uses it: it holds requests then
    client = Client(engine, quantization="ascend", quantization_side="receiver")
    client.update(weights_of(first).items())
    engine.sample(4)
    with pytest.raises(RuntimeError, match=f"{O_PROJ}.*NaN"):
        client.update(FAULTS["NaN"][0](weights_of(second)).items())
    with pytest.raises(RuntimeError, match=f"refuses to serve: a weight update was refused: .*{O_PROJ}.*NaN"):
        engine.sample(4)


KILLED = """
import json, os, sys, time
from safetensors.torch import load_file
from verl.workers.weight_sync.sender import WeightSender

sender = WeightSender(20_000)
sender.begin(7, load_file(sys.argv[1]).items())
buckets = [sender.next_bucket() for _ in range(2)]
inodes = [os.stat(f"/proc/self/fd/{bucket['segment']['fd']}").st_ino for bucket in buckets]
print(json.dumps([buckets, inodes]), flush=True)
time.sleep(600)
"""


def mapped_inodes():
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {int(line.split()[4]) for line in lines if "memfd:verl-weights" in line}


def test_killed_client_leaves_no_shared_memory_and_the_next_client_repairs_the_engine(running, tmp_path, tiny_models):
    engine, client, first, _ = running
    directory = tiny_models(2, kind="qwen3", tied=True, std=0.02, **SIZES)[1]
    before = set(os.listdir("/dev/shm"))
    other = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(directory / "model.safetensors")], stdout=subprocess.PIPE, text=True
    )
    buckets, inodes = json.loads(other.stdout.readline())
    client.llm.start_weight_update()
    client.call(bucket=buckets[0])
    assert inodes[0] in mapped_inodes()
    other.kill()
    other.wait()
    with pytest.raises(Exception, match=f"process {other.pid} cannot be opened"):
        client.call(bucket=buckets[1])
    assert refuses_to_serve(engine)
    assert set(os.listdir("/dev/shm")) == before
    assert not mapped_inodes() & set(inodes)
    client.update(first.items())
    engine.sample(4)


def test_example_prints_the_checksums_of_our_own_update(tiny_models, engines):
    first, second = tiny_models(2, kind="qwen3", tied=True, std=0.02, dtype="bfloat16", **SIZES)
    done = subprocess.run(
        [sys.executable, ROOT / "examples/weight_transfer/client.py", first, second, "--dtype", "float32"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "VLLM_LOGGING_LEVEL": "WARNING"},
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    printed = re.findall(r"^([0-9a-f]{64})  (\S+)$", done.stdout, re.MULTILINE)
    own, scheme = engines.get(first, ROLLOUT)
    own.update(scheme.encode(weights_of(second).items()))
    [hashes] = own.rpc("verl_parameter_hashes")
    assert {name.rpartition(":")[2]: digest for digest, name in printed} == hashes
