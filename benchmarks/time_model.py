"""Times of a GRPO step and of a weight update as pure functions of counts, a load and the parameters of a device.

The same model serves every machine; only the numbers in `Device` differ. Times are seconds; rates are per second.

- Generation: every replica decodes its share of the samples together, one token per sample and pass. A pass takes the
  longer of two times, reading the weights (only experts that some token chooses) and the cache, or multiplying; plus
  overheads.
- Passes of the trainer: 2 FLOPs per weight and token forward, twice as many backward, the head for response tokens
  only; attention over half the context; micro-batches one after the other. Weights are gathered for each pass and
  gradients scattered (FSDP2); on a device that overlaps, computation hides this traffic.
- Weight update: encode, gather to one rank, send, load. On a device that overlaps, this is a pipeline: it takes its
  slowest part, plus one bucket's share of the other parts. On a shared processor it takes the sum of the parts, and the
  overheads grow with the number of ranks and replicas.
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
    """Seconds spent neither on computation nor on moving bytes.

    Attributes:
        decode, decode_layer: per decoding pass, and per layer in it.
        sample: per sample, in the driver and in the engine's front end.
        micro_batch, micro_batch_layer: per forward pass over a micro-batch, and per layer in it; a forward and backward
            pass takes three times as long.
        update, update_layer, update_bucket: per weight update, per layer of the model, and per bucket.
        step: per step, in addition to all others.
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
    """A device, or the share of a processor that one rank and one replica use alternately.

    Attributes:
        train_flops, generate_flops: FLOP/s of the trainer's passes, and of the engine's large passes; measured or
            expected rates, not peak rates.
        read_bandwidth: bytes of weights and cache read per second in a decoding pass.
        copy_bandwidth: bytes copied per second (each is read once and written once).
        link_bandwidth, link_latency: bytes per second into a device in a collective, and seconds per call.
        collect_bandwidth, collect_latency: bytes per second into one device that collects from all others, and seconds
            per call; None: the same as the link's.
        memory: bytes; None: no limit.
        itemsize: bytes per element of weights in training, in a gather, and in an unquantized engine.
        load_copies: the engine's work on loaded weights, as a number of copies of them.
        bucket_bytes: largest size of a bucket in a weight update.
        overlaps: computation, transfers and copies run at the same time.
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
    """Work of a step.

    Attributes:
        prompts, n: number of prompts, and samples per prompt.
        prompt: tokens per prompt.
        lengths: tokens of the responses; a selection that represents all of them.
        micro_batch_tokens: largest number of tokens in a micro-batch.
        updates: optimizer steps.
        recomputes: the backward pass repeats the forward pass (gradient checkpointing).
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
        """Mean number of tokens of a response."""
        return sum(self.lengths) / len(self.lengths)


@dataclass(frozen=True)
class Layout:
    """Trainer ranks, replicas on the same devices, devices per replica, and capacity of its cache in tokens."""

    ranks: int
    replicas: int
    tensor_parallel: int = 1
    cache_tokens: float = math.inf


@dataclass(frozen=True)
class Times:
    """Seconds of the parts of a step."""

    generation: float
    old_log_probs: float
    updates: float
    weight_update: float
    rest: float

    @property
    def step(self) -> float:
        return self.generation + self.old_log_probs + self.updates + self.weight_update + self.rest


def predict(counts: Counts, work: Work, device: Device, layout: Layout, sent_bytes: int, held_bytes: int) -> Times:
    """Predict the times of a step.

    Args:
        sent_bytes: bytes of the weight update.
        held_bytes: bytes of the weights in the engine.
    """
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
    """Predict the seconds until the longest response is complete."""
    over, tp = device.overheads, layout.tensor_parallel
    per_replica = work.samples / layout.replicas
    prompts = work.prompts / layout.replicas * work.prompt
    prefill = 2 * (counts.body * prompts) / (tp * device.generate_flops)
    total = prefill + per_replica * over.sample
    generated = 0
    for length in sorted(set(work.lengths)):
        active = per_replica * sum(other >= length for other in work.lengths) / len(work.lengths)
        context = work.prompt + (generated + length) / 2
        # Samples that do not fit into the cache wait until others end.
        concurrent = min(active, layout.cache_tokens / context)
        passes = (length - generated) * active / concurrent
        total += passes * _decode_pass(counts, device, tp, concurrent, context, held_bytes)
        generated = length
    return total


def _decode_pass(counts: Counts, device: Device, tp: int, active: float, context: float, held_bytes: int) -> float:
    share = counts.experts / counts.parameters
    # Only experts that some token chooses are read.
    hit = 1 - (1 - counts.chosen) ** active if counts.experts else 1.0
    read = held_bytes * (1 - share + share * hit) + active * context * counts.kv_elements * device.itemsize
    multiply = 2 * active * (counts.body + counts.head + 2 * counts.layers * counts.attention * context)
    reduces = 2 * counts.layers * device.link_latency if tp > 1 else 0.0
    compute = max(read / (tp * device.read_bandwidth), multiply / (tp * device.generate_flops))
    return compute + reduces + device.overheads.decode + counts.layers * device.overheads.decode_layer


def micro_batches(work: Work, layout: Layout) -> int:
    """Return the number of micro-batches of a rank in one pass over the step."""
    tokens = work.samples / layout.ranks * (work.prompt + work.mean)
    return max(work.updates, math.ceil(tokens / work.micro_batch_tokens))


def pass_seconds(counts: Counts, work: Work, device: Device, layout: Layout) -> float:
    """Predict the seconds of one forward pass of the trainer over the samples of a step."""
    tokens = work.prompt + work.mean
    attention = 2 * counts.layers * counts.attention * tokens  # two products over half the context
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
    """Predict the seconds of AdamW and clipping on a shard: traffic of weight, gradient and two moments in float32."""
    return 4 * 4 * counts.parameters / layout.ranks / device.copy_bandwidth


def weight_update_seconds(
    counts: Counts, device: Device, layout: Layout, sent_bytes: int, sent_share: float = 1.0
) -> float:
    """Predict the seconds of an update from the trainer's shards to every replica.

    Args:
        sent_bytes: bytes of a full update.
        sent_share: share of these bytes that is sent; below 1 for a delta.
    """
    source = counts.parameters * device.itemsize
    moved = sent_bytes * sent_share
    parts = [
        # Each rank encodes its own shard: it reads the shard and writes the encoded bytes.
        max(source, sent_bytes) / layout.ranks / device.copy_bandwidth,
        # One rank receives the shards of all others.
        moved * (layout.ranks - 1) / layout.ranks / (device.collect_bandwidth or device.link_bandwidth),
        moved / layout.tensor_parallel / device.copy_bandwidth * device.load_copies,
    ]
    if device.overlaps:
        # Over the link to the replicas; with one shared memory, the bucket is already there.
        parts.append(moved / device.link_bandwidth)
    call = device.link_latency if device.collect_latency is None else device.collect_latency
    latency = min(counts.tensors, math.ceil(sent_bytes / GATHER_BATCH_BYTES)) * call if layout.ranks > 1 else 0.0
    buckets = math.ceil(sent_bytes / bucket_capacity(device.bucket_bytes, sent_bytes))
    overheads = device.overheads
    over = overheads.update + counts.layers * overheads.update_layer + buckets * overheads.update_bucket
    if not device.overlaps:
        # The overheads are measured with one sender and one engine, which do part of this work at the same time. With n
        # of each on the same cores the factor is between 1 (no overlap before) and n (full overlap): take the mean.
        over *= (1 + layout.ranks) / 2
    over += latency
    if device.overlaps:
        return over + max(parts) + (sum(parts) - max(parts)) / buckets
    return over + sum(parts)


def hybrid_layout(counts: Counts, held_bytes: int, memory: float, itemsize: int, devices: int) -> Layout | None:
    """Choose the layout of trainer and replicas on the same devices; None if they do not fit.

    A device holds its shard of 16 bytes per parameter (float32 weights, gradients, moments) and its part of a replica's
    weights. The replica has the fewest devices that leave half of the remaining memory free; 80 % of the free memory is
    cache.
    """
    rest = memory - 16 * counts.parameters / devices
    for tp in (1, 2, 4, 8, 16):
        if tp <= devices and held_bytes / tp <= 0.5 * rest:
            cache = 0.8 * (tp * rest - held_bytes) / (counts.kv_elements * itemsize)
            return Layout(devices, devices // tp, tp, cache)
    return None
