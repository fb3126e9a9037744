"""Times of a GRPO step and of a weight update as pure functions of counts, a load and a device's parameters.

One model for every machine: what differs is the numbers in `Device`. All times are seconds, rates per second.

- Generation: every replica decodes its share of the samples together, one token each a pass. A pass takes the longer of
  reading the weights (of the experts those that are hit) and the cache, and of multiplying; plus overheads.
- Passes of the trainer: 2 FLOPs a weight and token forward, twice that backward, the head at answers' tokens only;
  attention over half the context; micro-batches one after the other. Weights are gathered for each pass and gradients
  scattered (FSDP2), behind the computing where the device overlaps.
- Weight update: encode, gather to one rank, send, load. A pipeline where the device overlaps: it takes its slowest
  part, and one bucket's share of the others; the sum of them where one processor does it all, with more bookkeeping
  the more ranks and replicas do theirs on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shapes import Counts

from verl.workers.engine.export import GATHER_BATCH_BYTES
from verl.workers.weight_sync.sender import bucket_capacity


@dataclass(frozen=True)
class Overheads:
    """Seconds of what is neither computing nor moving bytes.

    Attributes:
        decode, decode_layer: of a decoding pass, and of each of its layers.
        sample: of each sample of a step, in the driver and at the engine's door.
        micro_batch, micro_batch_layer: of a forward pass over a micro-batch, and of each of its layers; with the
            backward pass three times that.
        update, update_layer, update_bucket: of a weight update, of each layer of the model, and of each bucket.
        step: of a step besides.
    """

    decode: float = 0.0
    decode_layer: float = 0.0
    sample: float = 0.0
    micro_batch: float = 0.0
    micro_batch_layer: float = 0.0
    update: float = 0.0
    update_layer: float = 0.0
    update_bucket: float = 0.0
    step: float = 0.0


@dataclass(frozen=True)
class Device:
    """A device, or the share of a processor that one rank and one replica take turns on.

    Attributes:
        train_flops, generate_flops: in the trainer's passes, in the engine's large ones; as reached, not as printed.
        read_bandwidth: bytes, weights and cache in a decoding pass.
        copy_bandwidth: bytes copied (each read once and written once).
        link_bandwidth, link_latency: bytes into a device in a collective, and seconds of a call of one.
        collect_bandwidth, collect_latency: bytes into one device of what the others send it, and seconds of a call;
            None where they are the link's.
        memory: bytes; None where it is not what limits.
        itemsize: bytes of a trained, gathered or unquantized generated element.
        load_copies: what the engine does with what it loads, in copies of it.
        bucket_bytes: of a weight update, at most.
        overlaps: whether computing, moving and copying go on at the same time.
    """

    train_flops: float
    generate_flops: float
    read_bandwidth: float
    copy_bandwidth: float
    link_bandwidth: float
    link_latency: float
    overheads: Overheads
    collect_bandwidth: float | None = None
    collect_latency: float | None = None
    memory: float | None = None
    itemsize: int = 2
    load_copies: float = 1.0
    bucket_bytes: int = 2048 << 20
    overlaps: bool = True


@dataclass(frozen=True)
class Work:
    """A step.

    Attributes:
        prompts, n: prompts, and samples of each.
        prompt: tokens of a prompt.
        lengths: tokens of the answers, some that stand for all.
        micro_batch_tokens: of a micro-batch, at most.
        updates: optimizer steps.
        recomputes: the backward pass runs the forward pass again (gradient checkpointing).
    """

    prompts: int
    n: int
    prompt: int
    lengths: Sequence[int]
    micro_batch_tokens: int
    updates: int
    recomputes: bool

    @property
    def samples(self) -> int:
        return self.prompts * self.n

    @property
    def mean(self) -> float:
        """Tokens of an answer."""
        return sum(self.lengths) / len(self.lengths)


@dataclass(frozen=True)
class Layout:
    """Trainer ranks, replicas on the same devices, devices of each replica, and tokens that its cache has room for."""

    ranks: int
    replicas: int
    tensor_parallel: int = 1
    cache_tokens: float = math.inf


@dataclass(frozen=True)
class Times:
    """Seconds of a step's parts."""

    generation: float
    old_log_probs: float
    updates: float
    weight_update: float
    rest: float

    @property
    def step(self) -> float:
        return self.generation + self.old_log_probs + self.updates + self.weight_update + self.rest


def predict(counts: Counts, work: Work, device: Device, layout: Layout, sent_bytes: int, held_bytes: int) -> Times:
    """A step. `sent_bytes`: of the weight update; `held_bytes`: of the weights as the engine holds them."""
    forward = pass_seconds(counts, work, device, layout)
    backward = (3 if work.recomputes else 2) * forward
    return Times(
        generation=generation_seconds(counts, work, device, layout, held_bytes),
        old_log_probs=forward,
        updates=forward + backward + work.updates * optimizer_seconds(counts, device, layout),
        weight_update=weight_update_seconds(counts, device, layout, sent_bytes),
        rest=device.overheads.step,
    )


def generation_seconds(counts: Counts, work: Work, device: Device, layout: Layout, held_bytes: int) -> float:
    """Until the longest answer is there."""
    over, tp = device.overheads, layout.tensor_parallel
    per_replica = work.samples / layout.replicas
    prompts = work.prompts / layout.replicas * work.prompt
    prefill = 2 * (counts.body * prompts) / (tp * device.generate_flops)
    total = prefill + per_replica * over.sample
    reached = 0
    for length in sorted(set(work.lengths)):
        active = per_replica * sum(other >= length for other in work.lengths) / len(work.lengths)
        context = work.prompt + (reached + length) / 2
        # Samples that the cache has no room for wait for others to end.
        together = min(active, layout.cache_tokens / context)
        passes = (length - reached) * active / together
        total += passes * _decode_pass(counts, device, tp, together, context, held_bytes)
        reached = length
    return total


def _decode_pass(counts: Counts, device: Device, tp: int, active: float, context: float, held_bytes: int) -> float:
    share = counts.experts / counts.parameters
    # Of the experts those that some token chooses are read.
    hit = 1 - (1 - counts.chosen) ** active if counts.experts else 1.0
    read = held_bytes * (1 - share + share * hit) + active * context * counts.kv_elements * device.itemsize
    multiply = 2 * active * (counts.body + counts.head + 2 * counts.layers * counts.attention * context)
    reduces = 2 * counts.layers * device.link_latency if tp > 1 else 0.0
    compute = max(read / (tp * device.read_bandwidth), multiply / (tp * device.generate_flops))
    return compute + reduces + device.overheads.decode + counts.layers * device.overheads.decode_layer


def micro_batches(work: Work, layout: Layout) -> int:
    """A rank's, in one pass over the whole step."""
    tokens = work.samples / layout.ranks * (work.prompt + work.mean)
    return max(work.updates, math.ceil(tokens / work.micro_batch_tokens))


def pass_seconds(counts: Counts, work: Work, device: Device, layout: Layout) -> float:
    """One forward pass of the trainer over the step's samples."""
    tokens = work.prompt + work.mean
    attention = 2 * counts.layers * counts.attention * tokens  # half the context, two products
    flops = 2 * (work.samples * (tokens * (counts.body + attention) + work.mean * counts.head))
    compute = flops / (layout.ranks * device.train_flops)
    number = micro_batches(work, layout)
    over = number * (device.overheads.micro_batch + counts.layers * device.overheads.micro_batch_layer)
    moved = 0.0
    if layout.ranks > 1:
        gathered = counts.parameters * device.itemsize * (layout.ranks - 1) / layout.ranks
        moved = number * (gathered / device.link_bandwidth + counts.layers * device.link_latency)
    return over + (max(compute, moved) if device.overlaps else compute + moved)


def optimizer_seconds(counts: Counts, device: Device, layout: Layout) -> float:
    """AdamW and clipping on a rank's shard: weight, gradient and two moments in float32, read and written."""
    return 4 * 4 * counts.parameters / layout.ranks / device.copy_bandwidth


def weight_update_seconds(
    counts: Counts, device: Device, layout: Layout, sent_bytes: int, changed: float = 1.0
) -> float:
    """From the trainer's shards to every replica. `changed`: the share of the bytes that is sent."""
    source = counts.parameters * device.itemsize
    parts = [
        # Each rank encodes its own shard: reads it, and writes what is sent into a bucket.
        max(source, sent_bytes) / layout.ranks / device.copy_bandwidth,
        # One rank receives what the others hold.
        sent_bytes * changed * (layout.ranks - 1) / layout.ranks / (device.collect_bandwidth or device.link_bandwidth),
        sent_bytes * changed / layout.tensor_parallel / device.copy_bandwidth * device.load_copies,
    ]
    if device.overlaps:
        # Over the link to the replicas; where everything is one memory, the bucket is already there.
        parts.append(sent_bytes * changed / device.link_bandwidth)
    call = device.link_latency if device.collect_latency is None else device.collect_latency
    latency = min(counts.tensors, math.ceil(sent_bytes / GATHER_BATCH_BYTES)) * call if layout.ranks > 1 else 0.0
    buckets = math.ceil(sent_bytes / bucket_capacity(device.bucket_bytes, sent_bytes))
    per = device.overheads
    over = per.update + counts.layers * per.update_layer + buckets * per.update_bucket
    if not device.overlaps:
        # It is known of one sender and one engine, who do part of it at the same time. More of them on the same cores
        # take as long if none of it was at the same time, and that many times as long if all of it was: halfway.
        over *= (1 + layout.ranks) / 2
    over += latency
    if device.overlaps:
        return over + max(parts) + (sum(parts) - max(parts)) / buckets
    return over + sum(parts)


def hybrid_layout(counts: Counts, held_bytes: int, memory: float, itemsize: int, devices: int) -> Layout | None:
    """Trainer and replicas on the same devices; None where they do not fit.

    A device holds its shard of 16 bytes a parameter (float32 weights, gradients, moments) and its part of a replica's
    weights. The smallest replica that leaves half of the rest free is taken; 80 % of what is free is cache.
    """
    rest = memory - 16 * counts.parameters / devices
    for tp in (1, 2, 4, 8, 16):
        if tp <= devices and held_bytes / tp <= 0.5 * rest:
            cache = 0.8 * (tp * rest - held_bytes) / (counts.kv_elements * itemsize)
            return Layout(devices, devices // tp, tp, cache)
    return None
