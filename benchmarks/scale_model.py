"""Predict step and update times of Qwen3 models on 8 to 1024 Ascend 950, and check the time model on this machine.

    python benchmarks/scale_model.py [--no-check] [--sizes 21M 59M 135M] [--steps 5] [--write DOCUMENT]

No times were measured on an Ascend 950. The functions of `time_model.py` predict them from the byte counts of the
quantization code (`shapes.py`) and from the published figures and assumptions below. The same functions, with
parameters measured by small probes (`probes.py`), predict runs of this machine with one and two ranks; a table shows
their errors.

Published figures:
- BF16 432, MXFP8 865 TFLOP/s (server variant), 128 GB at 1.6 TB/s for the 950PR: the architecture white paper as quoted
  in gitcode.com/cann/ops-transformer/issues/5487. "1 PFLOPS FP8" is the rounded figure of the keynote.
- 144 GB at 4 TB/s for the 950DT, 2 TB/s of interconnect for both, 8192 of them in one Atlas 950 SuperPoD:
  huawei.com/en/news/2025/9/hc-xu-keynote-speech. The 2 TB/s count both directions.
- 5.3 GB/s is the rate of upstream verl's HCCL weight transfer for Qwen3-30B-A3B between 2 x 16 Ascend 910C (11 s),
  according to verl/checkpoint_engine/README.md of verl-project/verl: software, not the links (784 GB/s), was the limit.

Assumptions, because no measurements were found:
- efficiency, as shares of the published figures: 40 % of the FLOPs in training (BF16), 50 % in prefill and large
  decoding passes (MXFP8), 60 % of the memory bandwidth, 50 % of one direction of the link;
- decoding runs as a graph: 1 ms per pass and 20 us per layer; a tensor-parallel reduction or other collective takes
  20 us;
- the driver takes 0.2 ms per sample and 0.5 s per step; an update takes 0.1 s, 2 ms per layer and 2 ms per bucket; no
  gaps between the layers of the trainer;
- hybrid layout: every device holds a trainer shard (FSDP2 over all ranks, 16 bytes per parameter) and 1 / tp of a
  replica; tp is the smallest value up to 16 that leaves half of the remaining memory free, of which 80 % is cache in
  BF16; samples that do not fit into the cache wait;
- gradient checkpointing, packed micro-batches of 16384 tokens, 1 optimizer step, weight traffic hidden behind
  computation;
- evenly spaced lengths, no sample is cut, no waiting for rewards; all devices in one SuperPoD.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import machine
import models
import runs
import shapes
import tables
import task
import time_model
from time_model import Device, Layout, Overheads, Times, Work

TB = 1e12
_ASCEND = Device(
    train_flops=0.4 * 432 * TB,
    generate_flops=0.5 * 865 * TB,
    read_bandwidth=0.6 * 4 * TB,
    copy_bandwidth=0.5 * 0.6 * 4 * TB,
    link_bandwidth=0.5 * 1 * TB,
    link_latency=20e-6,
    overheads=Overheads(
        decode=1e-3,
        decode_layer=20e-6,
        sample=0.2e-3,
        micro_batch=0.0,
        update=0.1,
        update_layer=2e-3,
        update_bucket=2e-3,
        step=0.5,
    ),
    memory=144e9,
)
ASCEND = {
    "950DT": _ASCEND,
    "950PR": replace(_ASCEND, read_bandwidth=0.6 * 1.6 * TB, copy_bandwidth=0.3 * 1.6 * TB, memory=128e9),
}
PUBLISHED_HCCL_BANDWIDTH = 5.3e9
DEVICES = (8, 16, 64, 256, 1024)
# 256 prompts, 16 samples each, 512 to 8192 tokens.
STEP = Work(
    prompts=256,
    n=16,
    prompt=512,
    lengths=task.spread(64, 512, 8192),
    micro_batch_tokens=16384,
    updates=1,
    recomputes=True,
)
# Bytes of a delta as a share of a full update's bytes: the target at a learning rate of 1e-6.
DELTA_SHARE = 0.01
CHECKED = runs.Load(prompts=8, n=4, shortest=32, longest=32, updates=2, micro_batch=8)
TOLERANCE = 0.25
PARTS = {
    "generation": "timing_s/gen",
    "old_log_probs": "timing_s/old_log_prob",
    "updates": "timing_s/update_actor",
    "weight_update": "weight_update/total_s",
    "step": "timing_s/step",
}


@dataclass(frozen=True)
class Prediction:
    """Predictions for a model on a number of devices.

    Attributes:
        layout: ranks and replicas on the devices.
        times: seconds of a step's parts.
        update_hccl, update_bf16, update_delta: seconds of a weight update at the published HCCL bandwidth: full in
            MXFP8, full in BF16, and as a delta in MXFP8.
    """

    layout: Layout
    times: Times
    update_hccl: float
    update_bf16: float
    update_delta: float


def on_ascend(counts: shapes.Counts, device: Device, devices: int) -> Prediction | None:
    """Predict a model on a number of Ascend devices; None if it does not fit."""
    assert device.memory is not None
    sent = counts.mxfp8_bytes
    layout = time_model.hybrid_layout(counts, sent, device.memory, device.itemsize, devices)
    if layout is None:
        return None
    slow = replace(device, link_bandwidth=PUBLISHED_HCCL_BANDWIDTH)
    update = time_model.weight_update_seconds
    return Prediction(
        layout,
        time_model.predict(counts, STEP, device, layout, sent, sent),
        update_hccl=update(counts, slow, layout, sent),
        update_bf16=update(counts, slow, layout, counts.unquantized_bytes(2)),
        update_delta=update(counts, slow, layout, sent, DELTA_SHARE),
    )


def ascend_table(chip: str) -> str:
    """Table of the predictions for every model and number of devices."""
    rows = []
    for name, config in shapes.PUBLIC.items():
        counts = shapes.count(config)
        for devices in DEVICES:
            found = on_ascend(counts, ASCEND[chip], devices)
            if found is None:
                rows.append([name, str(devices), "does not fit", *[""] * 9])
                continue
            times, generated = found.times, STEP.samples * STEP.mean
            seconds = (times.generation, times.old_log_probs, times.updates, times.weight_update, times.step)
            updates = (found.update_hccl, found.update_bf16, found.update_delta)
            rows.append(
                [
                    name,
                    str(devices),
                    str(found.layout.tensor_parallel),
                    *(f"{value:.1f}" for value in seconds),
                    f"{generated / times.step / devices:.0f}",
                    *(f"{value:.1f}" for value in updates),
                ]
            )
    head = ["model", "devices", "tp", "generation", "old log-probs", "updates", "weight update", "step, s"]
    head += ["tokens/s/device", "update at 5.3 GB/s", "BF16 at 5.3 GB/s", "delta at 5.3 GB/s"]
    return tables.markdown(head, rows)


def bytes_table() -> str:
    """Table of the bytes of a full update."""
    rows = []
    for name, config in shapes.PUBLIC.items():
        counts = shapes.count(config)
        bf16, mxfp8 = counts.unquantized_bytes(2), counts.mxfp8_bytes
        rows.append([name, f"{counts.parameters / 1e9:.2f}", f"{bf16 / 1e9:.1f}", f"{mxfp8 / 1e9:.1f}"])
        rows[-1].append(f"{mxfp8 / bf16:.1%}")
    return tables.markdown(["model", "parameters, 1e9", "BF16, GB", "MXFP8, GB", "of BF16"], rows)


def work_of(load: runs.Load) -> Work:
    """Convert the load of a benchmark to the time model's `Work`."""
    tokens = load.micro_batch * (load.prompt + load.longest)
    return Work(load.prompts, load.n, load.prompt, load.lengths, tokens, load.updates, recomputes=False)


def measure(
    size: str, load: runs.Load, ranks: int, steps: int, bucket_megabytes: int | None = None
) -> dict[str, float]:
    """Run a load; return medians of the seconds of `PARTS` and of an update's `buckets`, after two warm-up steps."""
    engine = "actor_rollout_ref.rollout.checkpoint_engine"
    keys = {"trainer.n_gpus_per_node": ranks, f"{engine}.delta": "off"}
    if bucket_megabytes is not None:
        keys[f"{engine}.update_weights_bucket_megabytes"] = bucket_megabytes
    with tempfile.TemporaryDirectory() as work:
        model_dir = models.write_model(size, Path(work) / "model")
        config = runs.keys(load, model_dir, Path(work) / "run", 2 + steps, keys)
        recorded = runs.finish(runs.start(config), config)[2:]
    named = PARTS | {"buckets": "weight_update/buckets"}
    return {part: statistics.median(step[name] for step in recorded) for part, name in named.items()}


def predicted(size: str, load: runs.Load, device: Device, ranks: int) -> dict[str, float]:
    """Predict the seconds of `PARTS` by the time model."""
    counts = shapes.count(models.config(size))
    sent = counts.unquantized_bytes(device.itemsize)
    times = time_model.predict(counts, work_of(load), device, Layout(ranks, ranks), sent, sent)
    return {part: getattr(times, part) for part in PARTS}


def check(sizes: list[str], steps: int) -> tuple[str, float]:
    """Compare predictions with runs of this machine; return a table and the largest error of a step or an update."""
    import probes

    rows, errors = [], []
    overheads, copies = probes.calibrate(lambda *run: measure(*run[:2], 1, steps, *run[2:]), predicted)
    named = ", ".join(f"{name} {1e3 * value:.2f}" for name, value in vars(overheads).items())
    lines = [f"Overheads, ms: {named}. Loading weights into an engine costs as much as {copies:.1f} copies."]
    for size in sizes:
        for ranks in (1, 2):
            device = probes.this_machine(models.config(size), CHECKED, ranks)
            device = replace(device, overheads=overheads, load_copies=copies)
            expected, found = predicted(size, CHECKED, device, ranks), measure(size, CHECKED, ranks, steps)
            lines.append(f"{size}, {ranks} rank(s): {rates(device)}.")
            row = [size, str(ranks)]
            for part in PARTS:
                error = expected[part] / found[part] - 1
                row.append(f"{expected[part]:.3f} / {found[part]:.3f} ({error:+.0%})")
                if part in ("step", "weight_update"):
                    errors.append(abs(error))
            rows.append(row)
            print(*lines[-1:], *row, sep="  ", flush=True)
    table = tables.markdown(["model", "ranks", *(part.replace("_", " ") for part in PARTS)], rows)
    return "\n".join([table, "", "Results of the probes:", *(f"- {line}" for line in lines)]), max(errors)


def rates(device: Device) -> str:
    """Sentence on the rates of a rank and a replica."""
    assert device.collect_bandwidth is not None and device.collect_latency is not None
    link = (
        f", link {device.link_bandwidth / 1e9:.2f} GB/s and {device.link_latency * 1e3:.2f} ms, to one rank "
        f"{device.collect_bandwidth / 1e9:.2f} GB/s and {device.collect_latency * 1e3:.2f} ms"
    )
    return (
        f"training {device.train_flops / 1e9:.1f} GFLOP/s, decoding {device.generate_flops / 1e9:.1f} GFLOP/s or "
        f"{device.read_bandwidth / 1e9:.1f} GB/s, copies {device.copy_bandwidth / 1e9:.1f} GB/s"
        f"{link if device.link_latency else ''}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-check", action="store_true", help="only predict for Ascend 950, in seconds")
    parser.add_argument("--sizes", nargs="+", default=["21M", "59M", "135M"], choices=[*models.GROWTH, *models.CONFIGS])
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each run, after two warm-up steps")
    tables.add_write_option(parser)
    options = parser.parse_args()
    print(machine.header(), flush=True)
    sections = [f"Bytes of a full update:\n\n{bytes_table()}"]
    for chip in ASCEND:
        sections.append(f"Ascend {chip}, seconds:\n\n{ascend_table(chip)}")
    if not options.no_check:
        table, worst = check(options.sizes, options.steps)
        verdict = "within" if worst <= TOLERANCE else "not within"
        sections.insert(
            0,
            f"{tables.caption('make bench-scale')} Predicted / measured seconds; the largest error of a step or a "
            f"weight update is {worst:.0%}, {verdict} the target of {TOLERANCE:.0%}:\n\n{table}",
        )
    text = "\n\n".join(sections)
    print(f"\n{text}")
    if options.write:
        tables.write_section(options.write, "scale", text)


if __name__ == "__main__":
    main()
