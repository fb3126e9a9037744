"""Replicas as actors: serving, the HTTP endpoint, the death of a process, refusal after a failed update."""

import asyncio
import json
import os
import re
import signal
import socket
import urllib.error
import urllib.request

import psutil
import pytest
import ray
from safetensors.torch import load_file
from transformers import AutoTokenizer

from fixtures.tiny import write_tiny_model
from verl.config import ModelConfig, RolloutConfig, ServerConfig
from verl.config.rollout import PrometheusConfig
from verl.workers.rollout.client import LLMServerClient
from verl.workers.rollout.quantization import get_scheme
from verl.workers.rollout.replica import ReplicaSet, vLLMReplica
from verl.workers.rollout.types import NoReplicaLeft
from verl.workers.rollout.vllm_rollout.engine_args import engine_environment
from verl.workers.rollout.vllm_rollout.http_endpoint import bind
from verl.workers.weight_sync.driver import update_weights
from verl.workers.weight_sync.manifest import WeightUpdateError
from verl.workers.weight_sync.sender import WeightSender

pytestmark = pytest.mark.e2e

PROMPT = [1, 10, 11, 12, 45]
SAMPLING = {"temperature": 1.0, "logprobs": 0, "ignore_eos": True, "max_tokens": 6}


def exported(sender):
    totals = {"seconds": sender.seconds, "full_bytes": sender.nbytes}
    return {"manifest": sender.manifest(), "encode": 0.0, "errors": {}, **totals}


class Sender:
    def __init__(self, weights):
        self.weights, self.sender = weights, WeightSender(1 << 20)

    async def begin_export(self, version, base):
        assert base is None
        self.sender.begin(version, self.weights.items())

    async def abort_export(self):
        self.sender.abort()

    async def next_bucket(self):
        return self.sender.next_bucket()

    async def finish_export(self):
        return exported(self.sender)


def replica(
    rank,
    model_dir,
    quantization=None,
    partial_rollout=False,
    response_length=64,
    self_test=None,
    library=None,
    prometheus=False,
    **server,
):
    rollout = RolloutConfig(
        quantization=quantization,
        quantization_self_test=self_test,
        partial_rollout=partial_rollout,
        tensor_model_parallel_size=1,
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=16,
        server=ServerConfig(**server),
        prometheus=PrometheusConfig(enable=prometheus, served_model_name="policy"),
        disable_log_stats=not prometheus,
    )
    arguments = {
        "rollout": rollout,
        "model": ModelConfig(path=str(model_dir)),
        "device": "cpu",
        "dtype": "float32",
        "prompt_length": 64,
        "response_length": response_length,
    }
    external_lib = [str(library)] if library else None
    environment = engine_environment(device="cpu", threads=1, tensor_parallel_size=1, external_lib=external_lib)
    return vLLMReplica(rank, arguments, {"num_cpus": 0}, environment)


def post(base, key, body):
    request = urllib.request.Request(
        f"{base}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")


def get(url):
    with urllib.request.urlopen(url, timeout=60) as response:
        return response.read().decode()


async def processor_share(pid, seconds):
    """Share of one core that a process and its descendants use over a period."""

    def used():
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        return sum(sum(process.cpu_times()[:2]) for process in family)

    begin = used()
    await asyncio.sleep(seconds)
    return (used() - begin) / seconds


async def test_life_cycle_of_two_replicas(tmp_path, ray_session):
    model_dir = write_tiny_model(tmp_path / "model")
    weights = load_file(model_dir / "model.safetensors")
    reports = {}
    replicas = [replica(0, model_dir, prometheus=True), replica(1, model_dir, enable_http=True)]
    pool = ReplicaSet(replicas, on_start=reports.__setitem__)
    client = LLMServerClient(pool)
    try:
        await pool.start()

        # A replica does not serve random weights: a request waits for the first update.
        waiting = asyncio.ensure_future(client.generate(PROMPT, SAMPLING))
        base, key = reports[1]["http"], reports[1]["api_key"]
        body = {"model": str(model_dir), "prompt": PROMPT, "max_tokens": 4}
        assert (await asyncio.to_thread(post, base, key, body))[0] == 503
        assert not waiting.done()
        await update_weights(Sender(weights), pool.alive, 7)
        output = await waiting
        assert len(output.token_ids) == len(output.log_probs) == 6
        assert output.weight_versions == [7] * 6 and output.stop_reason == "length"
        metrics = await asyncio.to_thread(get, f"{reports[0]['http']}/metrics")
        counted = re.search(r'vllm:generation_tokens_total\{[^}]*model_name="policy"[^}]*\} (\d+)', metrics)
        assert counted is not None and int(counted[1]) == 6 and reports[0]["api_key"] is None

        # Between requests the replica's processes leave the cores to the trainer.
        assert await processor_share(reports[0]["pid"], 1.0) < 0.1

        # The endpoint listens on loopback and requires the key.
        assert base.startswith("http://127.0.0.1:")
        assert (await asyncio.to_thread(post, base, None, body))[0] == 401
        status, answer = await asyncio.to_thread(post, base, key, body)
        assert status == 200 and answer["choices"][0]["finish_reason"]

        # A prompt without room for a response, or an unknown sampling parameter, fails the request only.
        with pytest.raises(ValueError, match="leaves no room in max_model_len=128"):
            await client.generate([5] * 128, SAMPLING)
        with pytest.raises(ValueError, match="temprature"):
            await client.generate(PROMPT, {"temprature": 1.0})

        # After a failed update every replica refuses, over HTTP too, until a full update succeeds.
        missing = {name: tensor for name, tensor in weights.items() if "layers.1.mlp.gate_proj" not in name}
        with pytest.raises(WeightUpdateError, match=r"layers\.1\.mlp"):
            await update_weights(Sender(missing), pool.alive, 8)
        with pytest.raises(NoReplicaLeft, match="version 8"):
            await client.generate(PROMPT, SAMPLING)
        assert (await asyncio.to_thread(post, base, key, body))[0] == 503
        await update_weights(Sender(weights), pool.alive, 9)
        assert (await client.generate(PROMPT, SAMPLING)).weight_versions[0] == 9

        # A replica dies during requests: the other one answers them.
        long = {**SAMPLING, "max_tokens": 60}
        running = [asyncio.ensure_future(client.generate(PROMPT, long)) for _ in range(12)]
        await asyncio.sleep(0.02)
        os.kill(reports[0]["pid"], signal.SIGKILL)
        outputs = await asyncio.gather(*running)
        assert all(len(output.token_ids) == 60 for output in outputs)
        later = await asyncio.gather(*(client.generate(PROMPT, SAMPLING) for _ in range(4)))
        assert all(output.weight_versions[0] == 9 for output in later)
        assert [each.rank for each in pool.alive] == [1]

        # A restarted replica serves after the next update.
        assert await pool.restart_dead() == 1
        await update_weights(Sender(weights), pool.alive, 10)
        assert len(pool.alive) == 2
        outputs = await asyncio.gather(*(client.generate(PROMPT, SAMPLING) for _ in range(8)))
        assert {output.weight_versions[0] for output in outputs} == {10}
    finally:
        await pool.stop()


@ray.remote(num_cpus=0, max_restarts=0)
class MortalSender:
    """A sender in its own process, which kills itself when bucket `fatal` is requested."""

    def __init__(self, model_dir, rollout, fatal):
        self.scheme = get_scheme(rollout, str(model_dir))
        self.weights = load_file(model_dir / "model.safetensors")
        self.sender, self.fatal, self.buckets = WeightSender(20_000), fatal, 0

    def begin_export(self, version):
        self.sender.begin(version, self.scheme.encode(self.weights.items()))

    def abort_export(self):
        self.sender.abort()

    def next_bucket(self):
        if self.buckets == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.buckets += 1
        return self.sender.next_bucket()

    def finish_export(self):
        # Written out: with a function of this module the actor would import the module.
        totals = {"seconds": self.sender.seconds, "full_bytes": self.sender.nbytes}
        return {"manifest": self.sender.manifest(), "encode": 0.0, "errors": {}, **totals}


class Remote:
    """An actor's methods as plain coroutines; `before(index)` is called before each bucket."""

    def __init__(self, actor, before=lambda index: None):
        self.actor, self.before, self.index = actor, before, 0

    async def begin_export(self, version, base):
        assert base is None
        await self.actor.begin_export.remote(version)

    async def abort_export(self):
        await self.actor.abort_export.remote()

    async def next_bucket(self):
        self.before(self.index)
        self.index += 1
        return await self.actor.next_bucket.remote()

    async def finish_export(self):
        return await self.actor.finish_export.remote()


async def test_processes_killed_in_the_middle_of_a_quantized_update(tmp_path, ray_session):
    model_dir = write_tiny_model(tmp_path / "model")
    reports = {}
    replicas = [replica(rank, model_dir, quantization="ascend", self_test=True) for rank in (0, 1)]
    rollout = RolloutConfig(quantization="ascend", tensor_model_parallel_size=1)
    pool = ReplicaSet(replicas, on_start=reports.__setitem__)
    client = LLMServerClient(pool)

    def sender(fatal=-1, **options):
        return Remote(MortalSender.remote(model_dir, rollout, fatal), **options)

    try:
        await pool.start()
        await update_weights(sender(), pool.alive, 1)
        assert (await client.generate(PROMPT, SAMPLING)).weight_versions[0] == 1
        hashes = await replicas[0].parameter_hashes()

        # The sender dies: both replicas have half of version 2 and refuse to serve.
        with pytest.raises(WeightUpdateError, match="version 2 failed"):
            await update_weights(sender(fatal=2), pool.alive, 2)
        with pytest.raises(NoReplicaLeft, match="version 2 failed"):
            await client.generate(PROMPT, SAMPLING)

        # A replica dies, and its engine with it.
        def kill(index):
            if index == 2:
                os.kill(reports[0]["pid"], signal.SIGKILL)

        with pytest.raises(WeightUpdateError, match="replica 0 died"):
            await update_weights(sender(before=kill), pool.alive, 3)
        with pytest.raises(NoReplicaLeft):
            await client.generate(PROMPT, SAMPLING)
        assert [each.rank for each in pool.alive] == [1]

        # A full update repairs both, and nothing of the earlier updates remains.
        assert await pool.restart_dead() == 1
        await update_weights(sender(), pool.alive, 4)
        assert (await client.generate(PROMPT, SAMPLING)).weight_versions[0] == 4
        assert [await each.parameter_hashes() for each in replicas] == [hashes, hashes]
    finally:
        await pool.stop()


async def test_engine_that_fails_its_self_test_does_not_start(tmp_path, ray_session):
    """The user's library, which every process of the engine imports, breaks the products of quantized layers."""
    library = tmp_path / "broken_products.py"
    library.write_text(
        "from verl.utils.vllm.ascend_cpu import AscendCpuLinearMethod\n"
        "right = AscendCpuLinearMethod.apply\n"
        "AscendCpuLinearMethod.apply = lambda self, layer, x, bias=None: 2 * right(self, layer, x, bias)\n"
    )
    model_dir = write_tiny_model(tmp_path / "model")
    broken = replica(0, model_dir, quantization="ascend", self_test=True, library=library)
    pool = ReplicaSet([broken])
    message = (
        r"replica 0, worker 0: .*self-test failed in model\.layers\.\d\.\S+ with verl's emulation .*the product with"
    )
    try:
        with pytest.raises(WeightUpdateError, match=message):
            await pool.start()
    finally:
        await pool.stop()


async def test_a_stop_string_ends_a_response(tmp_path, ray_session):
    """The tokens that complete the string belong to the response; over HTTP `stop` means what vLLM makes of it."""
    model_dir = write_tiny_model(tmp_path / "model")
    weights = load_file(model_dir / "model.safetensors")
    pool = ReplicaSet([replica(0, model_dir, enable_http=True)], on_start=(reports := {}).__setitem__)
    client = LLMServerClient(pool)
    # Of the characters; the model's vocabulary is larger than the tokenizer's.
    sampling = {**SAMPLING, "max_tokens": 40, "seed": 5, "allowed_token_ids": list(range(4, 80))}
    try:
        await pool.start()
        await update_weights(Sender(weights), pool.alive, 1)
        full = await client.generate(PROMPT, sampling)
        text = AutoTokenizer.from_pretrained(model_dir).decode(full.token_ids)
        assert len(text) == len(full.token_ids) == 40
        stop = text[9:12]
        start = text.index(stop)
        length = start + len(stop)
        for include in ({}, {"include_stop_str_in_output": True}, {"include_stop_str_in_output": False}):
            stopped = await client.generate(PROMPT, {**sampling, "stop": [stop, "never there"], **include})
            assert (stopped.token_ids, stopped.stop_reason) == (full.token_ids[:length], "stop")
            assert stopped.log_probs == pytest.approx(full.log_probs[:length], abs=1e-5)
            assert stopped.weight_versions == [1] * length

            body = {"model": str(model_dir), "prompt": PROMPT, **sampling, "stop": stop, **include}
            status, reply = await asyncio.to_thread(post, reports[0]["http"], reports[0]["api_key"], body)
            (choice,) = reply["choices"]
            included = include.get("include_stop_str_in_output", False)
            assert (status, choice["finish_reason"], choice["stop_reason"]) == (200, "stop", stop)
            assert choice["text"] == text[: length if included else start]
            assert reply["usage"]["completion_tokens"] == length
    finally:
        await pool.stop()


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"rollout.server.port={port} on 127.0.0.1: .*choose another port"):
            bind("127.0.0.1", port)
