"""Measure the parameters of this machine for `time_model.py` with probes of a few seconds each.

Rates are measured with the weights of the model in question, with copies, and with collectives. Parameters that no
probe can show come from runs. Overheads come from models so small that computation and transfers take almost no time: a
shallow one, a deep one, the shallow one with more samples, and the deep one with more buckets. The engine's work on
loaded weights comes from a model with few, large layers.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import models
import runs
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from time_model import Device, Overheads
from transformers import PretrainedConfig

from verl.utils.host import cpu_cores, cpu_environment

Parts = dict[str, float]
# Models of the runs: the deep one is the shallow one with more layers, the wide one has large layers.
SHALLOW, DEEP, WIDE = "shallow", "deep", "wide"
FEW = runs.Load(prompts=4, n=4, shortest=32, longest=32, updates=2, micro_batch=8)
MANY = replace(FEW, prompts=16, micro_batch=32)
# Size in MiB: an update of the deep model takes many buckets of this size.
SMALL_BUCKETS = 1
# Micro-batches in one pass over the step, for both loads.
_MICRO_BATCHES = 2
# Duration of a probe without collectives; such a probe may make a different number of calls on each rank.
_PROBE_SECONDS = 1.0
_COPY_BYTES = 64 << 20
_GATHER_BYTES = 32 << 20


def median_seconds(call: Callable[[], object], rounds: int = 7, at_least: float = 0.0) -> float:
    """Return the median seconds of a call, after one warm-up call.

    Args:
        rounds: minimum number of calls.
        at_least: minimum seconds of all calls together; more rounds fill the rest.
    """
    call()
    durations: list[float] = []
    begun = time.perf_counter()
    while len(durations) < rounds or time.perf_counter() - begun < at_least:
        started = time.perf_counter()
        call()
        durations.append(time.perf_counter() - started)
    return statistics.median(durations)


def copy_bandwidth(at_least: float) -> float:
    """Measure the bytes copied per second with all threads, for `at_least` seconds."""
    source, target = torch.ones(_COPY_BYTES, dtype=torch.uint8), torch.empty(_COPY_BYTES, dtype=torch.uint8)
    return _COPY_BYTES / median_seconds(lambda: target.copy_(source), at_least=at_least)


def layer_weights(config: PretrainedConfig, copies: int) -> list[list[torch.Tensor]]:
    """Return the float32 matrices [out, in] of `copies` decoder layers, each in its own memory."""
    attention = config.num_attention_heads * config.head_dim
    cached = config.num_key_value_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    layer = [(attention + 2 * cached, hidden), (hidden, attention), (2 * inner, hidden), (hidden, inner)]
    return [[torch.randn(shape) * 0.02 for shape in layer] for _ in range(copies)]


def decode_rates(config: PretrainedConfig, active: int, at_least: float) -> tuple[float, float]:
    """Measure bytes of weights read per second with one row, and FLOP/s with `active` rows.

    All layers of the model take turns, so that no processor cache holds the weights. Weights are packed for oneDNN, as
    in vLLM: with few rows this is several times faster than unpacked weights.
    """
    layers = layer_weights(config, copies=config.num_hidden_layers)
    weights = [(weight.shape[1], _packed(weight)) for layer in layers for weight in layer]
    elements = sum(weight.numel() for layer in layers for weight in layer)

    @torch.no_grad()
    def pass_over(rows: int) -> None:
        for inputs, weight in weights:
            torch.ops.mkldnn._linear_pointwise(torch.ones(rows, inputs), weight, None, "none", [], "")

    one, many = (median_seconds(lambda rows=rows: pass_over(rows), at_least=at_least) for rows in (1, active))
    return 4 * elements / one, 2 * active * elements / many


def _packed(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def train_flops(config: PretrainedConfig, samples: int, prompt: int, response: int, at_least: float) -> float:
    """Measure the FLOP/s of a forward and backward pass over a micro-batch of `samples` prompts and responses.

    The head is computed for response tokens only. A reduction over its logits follows; it takes time, but no FLOPs are
    counted for it.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters() if parameter.dim() == 2)
    tokens = prompt + response
    ids = torch.randint(3, config.vocab_size, (samples, tokens))

    def forward_backward() -> None:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, prompt:]
        model.lm_head(hidden).logsumexp(-1).sum().backward()

    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * tokens
    flops = 6 * samples * (tokens * (layers + attention) + response * model.lm_head.weight.numel())
    return flops / median_seconds(forward_backward, rounds=3, at_least=at_least)


def this_machine(config: PretrainedConfig, load: runs.Load, ranks: int, at_least: float = _PROBE_SECONDS) -> Device:
    """Measure one rank's share of this machine for a model and a load; the result has no overheads.

    One process per rank runs the probes, all at the same time, with its share of the threads and the environment of a
    run.

    Args:
        at_least: seconds of each probe without collectives.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    # The C library reads the environment at process start, so it is set here for the spawned processes, and only for
    # them.
    with mock.patch.dict(os.environ, cpu_environment(max(1, cpu_cores() // ranks))):
        multiprocessing.spawn(_probe, (ranks, port, config, load, at_least, results), nprocs=ranks)
    return results.get()


def _probe(
    rank: int,
    ranks: int,
    port: int,
    config: PretrainedConfig,
    load: runs.Load,
    at_least: float,
    results: multiprocessing.SimpleQueue,
) -> None:
    torch.set_num_threads(max(1, cpu_cores() // ranks))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)

    def synchronized(probe: Callable[[], Any]) -> Any:
        dist.barrier()
        return probe()

    read, generate = synchronized(lambda: decode_rates(config, max(1, load.samples // ranks), at_least))
    no_link = float("inf"), 0.0
    bandwidth, latency = no_link if ranks == 1 else synchronized(lambda: link(ranks))
    collect_bandwidth, collect_latency = no_link if ranks == 1 else synchronized(lambda: collect(rank, ranks))
    device = Device(
        train_flops=synchronized(lambda: train_flops(config, load.micro_batch, load.prompt, load.longest, at_least)),
        generate_flops=generate,
        read_bandwidth=read,
        copy_bandwidth=synchronized(lambda: copy_bandwidth(at_least)),
        link_bandwidth=bandwidth,
        link_latency=latency,
        collect_bandwidth=collect_bandwidth,
        collect_latency=collect_latency,
        overheads=Overheads(),
        itemsize=4,
        overlaps=False,
    )
    if rank == 0:
        results.put(device)
    dist.barrier()
    dist.destroy_process_group()


def link(ranks: int) -> tuple[float, float]:
    """Measure an all-gather: bytes per second into each rank, and seconds per call."""

    def gather(size: int, rounds: int) -> float:
        shard = torch.ones(size // ranks, dtype=torch.uint8)
        gathered = torch.empty(len(shard) * ranks, dtype=torch.uint8)
        return median_seconds(lambda: dist.all_gather_into_tensor(gathered, shard), rounds)

    return _rate_and_latency(gather, ranks)


def collect(rank: int, ranks: int) -> tuple[float, float]:
    """Measure a gather to rank 0, as in a weight update: bytes per second into rank 0, and seconds per call."""

    def gather_to_rank0(size: int, rounds: int) -> float:
        shard = torch.ones(size // ranks, dtype=torch.uint8)
        receive_sizes = [len(shard) if rank == 0 else 0] * ranks
        send_sizes = [len(shard), *[0] * (ranks - 1)]
        gathered = torch.empty(sum(receive_sizes), dtype=torch.uint8)
        return median_seconds(lambda: dist.all_to_all_single(gathered, shard, receive_sizes, send_sizes), rounds)

    return _rate_and_latency(gather_to_rank0, ranks)


def _rate_and_latency(collective: Callable[[int, int], float], ranks: int) -> tuple[float, float]:
    small, large = collective(1 << 10, 101), collective(_GATHER_BYTES, 7)
    return _GATHER_BYTES * (ranks - 1) / ranks / max(large - small, 1e-9), small


def calibrate(measure: Callable[..., Parts], predict: Callable[..., Parts]) -> tuple[Overheads, float]:
    """Determine the parameters that no probe can show, at one rank: overheads, and `Device.load_copies`.

    Overheads are the measured seconds of the smallest models minus the predicted seconds of their computation.
    `load_copies` follows from the rest of the weight update of a model with large layers.

    Args:
        measure: runs (model, load[, MiB of a bucket]); returns the seconds of the parts, and the number of `buckets` of
            an update.
        predict: predicts the seconds of the parts by the time model from (model, load, device, ranks).

    Returns:
        (overheads, load_copies).
    """
    measured, devices = {}, {}
    for run in ((SHALLOW, FEW), (DEEP, FEW), (SHALLOW, MANY), (DEEP, FEW, SMALL_BUCKETS), (WIDE, FEW)):
        size, load = run[:2]
        if (size, load) not in devices:
            devices[size, load] = this_machine(models.config(size), load, 1)
        measured[run] = measure(*run)
    *small, large = measured
    layers = [models.config(size).num_hidden_layers for size in (SHALLOW, DEEP)]

    def predict_with(run: tuple[Any, ...], **parameters: Any) -> Parts:
        return predict(*run[:2], replace(devices[run[:2]], **parameters), 1)

    overheads, copies = Overheads(), 1.0
    # Each of the two is computed from the other. Small models copy almost nothing, so the iteration converges quickly.
    for _ in range(4):
        excess = []
        for run in small:
            expected = predict_with(run, load_copies=copies)
            excess.append({part: found - expected.get(part, 0.0) for part, found in measured[run].items()})
        overheads = solve(*excess, *layers)
        none, one = (predict_with(large, overheads=overheads, load_copies=n)["weight_update"] for n in (0.0, 1.0))
        copies = max(0.0, (measured[large]["weight_update"] - none) / (one - none))
    return overheads, copies


def solve(
    shallow: Parts, deep: Parts, many: Parts, bucketed: Parts, shallow_layers: int, deep_layers: int
) -> Overheads:
    """Compute overheads from the excess seconds of four runs, and from their `buckets`.

    Args:
        shallow, deep: load `FEW` on the models of the two depths.
        many: load `MANY` on the shallow model.
        bucketed: load `FEW` on the deep model with more buckets.
        shallow_layers, deep_layers: decoder layers of the two models.
    """

    def line(shallow_seconds: float, deep_seconds: float) -> tuple[float, float]:
        """Return the seconds without layers and per layer; noise makes neither negative."""
        slope = max(0.0, (deep_seconds - shallow_seconds) / (deep_layers - shallow_layers))
        return max(0.0, shallow_seconds - shallow_layers * slope), slope

    def forward_pass(parts: Parts) -> float:
        """Return the seconds of a forward pass over a micro-batch; old log-probabilities take one, an update three."""
        return (parts["old_log_probs"] + parts["updates"]) / (4 * _MICRO_BATCHES)

    sample = max(0.0, (many["generation"] - shallow["generation"]) / (MANY.samples - FEW.samples))
    decode, decode_layer = line(*((run["generation"] - FEW.samples * sample) / FEW.longest for run in (shallow, deep)))
    micro_batch, micro_batch_layer = line(forward_pass(shallow), forward_pass(deep))
    more = bucketed["buckets"] - deep["buckets"]
    update_bucket = max(0.0, (bucketed["weight_update"] - deep["weight_update"]) / more)
    update, update_layer = line(*(run["weight_update"] - run["buckets"] * update_bucket for run in (shallow, deep)))
    parts = ("generation", "old_log_probs", "updates", "weight_update")
    return Overheads(
        decode=decode,
        decode_layer=decode_layer,
        sample=sample,
        micro_batch=micro_batch,
        micro_batch_layer=micro_batch_layer,
        update=update,
        update_layer=update_layer,
        update_bucket=update_bucket,
        step=max(0.0, shallow["step"] - sum(shallow[part] for part in parts)),
    )
