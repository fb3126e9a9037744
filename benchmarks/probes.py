"""This machine's parameters for `time_model.py`, by probes of some seconds each.

Rates come from the model in question and its weights, copies and a collective. What no such probe shows comes from
runs: overheads from models so small that they compute and move next to nothing (a shallow one, a deep one, the shallow
one with more samples, the deep one with more buckets), and what an engine does with the weights that it loads from a
model of few large layers.
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
# Runs that show what no probe does; the deep model is the shallow one with more layers, the wide one has large ones.
SHALLOW, DEEP, WIDE = "shallow", "deep", "wide"
FEW = runs.Load(prompts=4, n=4, shortest=32, longest=32, updates=2, micro_batch=8)
MANY = replace(FEW, prompts=16, micro_batch=32)
# Buckets so small that an update of the deep model takes many.
SMALL_BUCKETS = 1
# Micro-batches of one pass over the step, of both loads.
_PASSES = 2
# Seconds of a probe without collectives, whose ranks need not agree on how often they call.
_PROBED = 1.0
_COPIED = 64 << 20
_GATHERED = 32 << 20


def seconds(call: Callable[[], object], rounds: int = 7, at_least: float = 0.0) -> float:
    """Of one call, the median of some rounds after one to warm up; of more, as long as `at_least` is not over."""
    call()
    found: list[float] = []
    begun = time.perf_counter()
    while len(found) < rounds or time.perf_counter() - begun < at_least:
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def copy_bandwidth(at_least: float) -> float:
    """Bytes copied per second with all threads, measured for `at_least` seconds."""
    source, target = torch.ones(_COPIED, dtype=torch.uint8), torch.empty(_COPIED, dtype=torch.uint8)
    return _COPIED / seconds(lambda: target.copy_(source), at_least=at_least)


def layer_weights(config: PretrainedConfig, copies: int) -> list[list[torch.Tensor]]:
    """Float32 matrices [out, in] of some decoder layers, different memory each."""
    attention = config.num_attention_heads * config.head_dim
    cached = config.num_key_value_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    layer = [(attention + 2 * cached, hidden), (hidden, attention), (2 * inner, hidden), (hidden, inner)]
    return [[torch.randn(shape) * 0.02 for shape in layer] for _ in range(copies)]


def decode_rates(config: PretrainedConfig, active: int, at_least: float) -> tuple[float, float]:
    """Bytes of weights read a second with one row, and FLOP/s with `active` rows, in layers that no cache holds.

    Weights are packed for oneDNN, as vLLM packs them: with few rows that is several times faster than without.
    """
    layers = layer_weights(config, copies=config.num_hidden_layers)
    weights = [(weight.shape[1], _packed(weight)) for layer in layers for weight in layer]
    elements = sum(weight.numel() for layer in layers for weight in layer)

    @torch.no_grad()
    def pass_over(rows: int) -> None:
        for inputs, weight in weights:
            torch.ops.mkldnn._linear_pointwise(torch.ones(rows, inputs), weight, None, "none", [], "")

    one, many = (seconds(lambda rows=rows: pass_over(rows), at_least=at_least) for rows in (1, active))
    return 4 * elements / one, 2 * active * elements / many


def _packed(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def train_flops(config: PretrainedConfig, samples: int, prompt: int, answer: int, at_least: float) -> float:
    """FLOP/s of the model forward and backward, for a micro-batch of `samples` prompts and responses.

    The head works at the answers alone, where it is followed by a pass over its logits that no FLOPs count.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters() if parameter.dim() == 2)
    tokens = prompt + answer
    ids = torch.randint(3, config.vocab_size, (samples, tokens))

    def both() -> None:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, prompt:]
        model.lm_head(hidden).logsumexp(-1).sum().backward()

    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * tokens
    flops = 6 * samples * (tokens * (layers + attention) + answer * model.lm_head.weight.numel())
    return flops / seconds(both, rounds=3, at_least=at_least)


def this_machine(config: PretrainedConfig, load: runs.Load, ranks: int, at_least: float = _PROBED) -> Device:
    """Measure one rank's share of this machine for a model and a load; without overheads.

    One process for each rank probes at the same time, with its share of the threads and the environment of a run.

    Args:
        at_least: seconds that each probe without collectives takes.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    # Spawned processes get this one's environment, which the C library reads when they start; later runs do not.
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

    def together(probe: Callable[[], Any]) -> Any:
        dist.barrier()
        return probe()

    read, generate = together(lambda: decode_rates(config, max(1, load.samples // ranks), at_least))
    alone = float("inf"), 0.0
    bandwidth, latency = alone if ranks == 1 else together(lambda: link(ranks))
    collected, call = alone if ranks == 1 else together(lambda: collect(rank, ranks))
    device = Device(
        train_flops=together(lambda: train_flops(config, load.micro_batch, load.prompt, load.longest, at_least)),
        generate_flops=generate,
        read_bandwidth=read,
        copy_bandwidth=together(lambda: copy_bandwidth(at_least)),
        link_bandwidth=bandwidth,
        link_latency=latency,
        collect_bandwidth=collected,
        collect_latency=call,
        overheads=Overheads(),
        itemsize=4,
        overlaps=False,
    )
    if rank == 0:
        results.put(device)
    dist.barrier()
    dist.destroy_process_group()


def link(ranks: int) -> tuple[float, float]:
    """Bytes into a rank a second, and seconds a call, of an all-gather between the ranks."""

    def gather(size: int, rounds: int) -> float:
        own = torch.ones(size // ranks, dtype=torch.uint8)
        whole = torch.empty(len(own) * ranks, dtype=torch.uint8)
        return seconds(lambda: dist.all_gather_into_tensor(whole, own), rounds)

    return _rate_and_latency(gather, ranks)


def collect(rank: int, ranks: int) -> tuple[float, float]:
    """The same of bringing every rank's bytes to rank 0 alone, as a weight update does."""

    def to_first(size: int, rounds: int) -> float:
        own = torch.ones(size // ranks, dtype=torch.uint8)
        coming = [len(own) if rank == 0 else 0] * ranks
        whole = torch.empty(sum(coming), dtype=torch.uint8)
        going = [len(own), *[0] * (ranks - 1)]
        return seconds(lambda: dist.all_to_all_single(whole, own, coming, going), rounds)

    return _rate_and_latency(to_first, ranks)


def _rate_and_latency(collective: Callable[[int, int], float], ranks: int) -> tuple[float, float]:
    small, large = collective(1 << 10, 101), collective(_GATHERED, 7)
    return _GATHERED * (ranks - 1) / ranks / max(large - small, 1e-9), small


def calibrate(measure: Callable[..., Parts], predict: Callable[..., Parts]) -> tuple[Overheads, float]:
    """What no probe shows, of this machine at one rank: overheads, and `Device.load_copies`.

    Overheads are what the smallest models take beyond their computing; how often an engine copies what it loads is what
    is left of a large model's weight update.

    Args:
        measure: seconds of the parts of a run, and the number of `buckets` of an update; for a model, a load and, where
            that is not the default, MiB of a bucket.
        predict: seconds by the time model, for a model, a load, a device and ranks.
    """
    measured, devices = {}, {}
    for run in ((SHALLOW, FEW), (DEEP, FEW), (SHALLOW, MANY), (DEEP, FEW, SMALL_BUCKETS), (WIDE, FEW)):
        size, load = run[:2]
        if (size, load) not in devices:
            devices[size, load] = this_machine(models.config(size), load, 1)
        measured[run] = measure(*run)
    *small, large = measured
    layers = [models.config(size).num_hidden_layers for size in (SHALLOW, DEEP)]

    def bare(run: tuple[Any, ...], **known: Any) -> Parts:
        return predict(*run[:2], replace(devices[run[:2]], **known), 1)

    overheads, copies = Overheads(), 1.0
    # Each is found with the other one known; small models hardly copy, so that this settles at once.
    for _ in range(4):
        beyond = []
        for run in small:
            expected = bare(run, load_copies=copies)
            beyond.append({part: found - expected.get(part, 0.0) for part, found in measured[run].items()})
        overheads = solve(*beyond, *layers)
        none, one = (bare(large, overheads=overheads, load_copies=n)["weight_update"] for n in (0.0, 1.0))
        copies = max(0.0, (measured[large]["weight_update"] - none) / (one - none))
    return overheads, copies


def solve(
    shallow: Parts, deep: Parts, many: Parts, bucketed: Parts, shallow_layers: int, deep_layers: int
) -> Overheads:
    """Overheads from four runs' seconds beyond computing, and their `buckets`.

    `FEW` on two depths, `MANY` on the shallow model, and `FEW` on the deep one with more buckets.
    """

    def line(few: float, more: float) -> tuple[float, float]:
        """Seconds of no layer, and of each; neither below nothing, whatever the noise."""
        slope = max(0.0, (more - few) / (deep_layers - shallow_layers))
        return max(0.0, few - shallow_layers * slope), slope

    def passes(parts: Parts) -> float:
        """Of one forward pass over a micro-batch: old log-probabilities take one, an update three."""
        return (parts["old_log_probs"] + parts["updates"]) / (4 * _PASSES)

    sample = max(0.0, (many["generation"] - shallow["generation"]) / (MANY.samples - FEW.samples))
    decode, decode_layer = line(*((run["generation"] - FEW.samples * sample) / FEW.longest for run in (shallow, deep)))
    micro_batch, micro_batch_layer = line(passes(shallow), passes(deep))
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
