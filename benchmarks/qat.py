"""Measure the cost of quantization-aware training: a step of the trainer with it against the same step without it.

    python benchmarks/qat.py [--size 135M] [--samples 16] [--tokens 128] [--steps 5] [--write DOCUMENT]

A step is the log-probabilities before the update, one forward and backward pass, and the optimizer, on one rank in
float32. Both engines are in this process and take turns, so that other work on the machine affects both alike.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import models
import tables
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from verl.config import FSDPConfig, ModelConfig, OptimConfig, RolloutConfig
from verl.protocol import DataProto
from verl.workers.engine import MicroBatching
from verl.workers.engine.fsdp import FSDPEngine
from verl.workers.engine.qat import QatOptions
from verl.workers.rollout.quantization import get_scheme

AIM = 1.25
VARIANTS: dict[str, dict[str, Any] | None] = {
    "without": None,
    "w8a8_mxfp8": {},
    "w8a16_mxfp8": {"activations": False},
}


def make_engine(directory: str, options: dict[str, Any] | None, tokens: int) -> FSDPEngine:
    """Return an engine that computes in float32, quantized unless `options` is None."""
    scheme = get_scheme(RolloutConfig(quantization="ascend", tensor_model_parallel_size=1), directory)
    return FSDPEngine(
        ModelConfig(path=directory),
        FSDPConfig(dtype="float32"),
        mesh=init_device_mesh("cpu", (1,)),
        device=torch.device("cpu"),
        compute_dtype="float32",
        max_model_len=tokens,
        optim_config=OptimConfig(),
        total_training_steps=1,
        qat=None if options is None else QatOptions(scheme, torch.float32, **options),
    )


def make_batch(samples: int, tokens: int, vocabulary: int) -> DataProto:
    """Return prompts and responses of random tokens, each half of `tokens`."""
    ids = torch.randint(3, vocabulary, (samples, tokens), generator=torch.Generator().manual_seed(0))
    half = tokens // 2
    columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "responses": ids[:, half:]}
    columns |= {"response_mask": torch.ones_like(ids[:, half:]), "prompts": ids[:, :half]}
    columns["position_ids"] = torch.arange(tokens).expand_as(ids)
    return DataProto.from_dict(tensors=columns, meta_info={"temperature": 1.0})


def step(engine: FSDPEngine, data: DataProto, limits: MicroBatching) -> float:
    """Return the seconds of a step."""
    started = time.perf_counter()
    engine.log_probs(data, limits, calculate_entropy=False)
    engine.forward_backward(data, lambda log_probs, entropy, columns: (-log_probs.mean(), {}), limits)
    engine.optimizer_step()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="135M", choices=tuple(models.CONFIGS))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="of a sample")
    parser.add_argument("--steps", type=int, default=5, help="measured, after one that warms up")
    tables.add_write_option(parser)
    options = parser.parse_args()
    print(machine.header(), flush=True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as work:
        directory = str(models.write_model(options.size, Path(work)))
        engines = {name: make_engine(directory, over, options.tokens) for name, over in VARIANTS.items()}
    data = make_batch(options.samples, options.tokens, models.CONFIGS[options.size].vocab_size)
    limits = MicroBatching(size=4)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(options.steps + 1):
        for name, engine in engines.items():
            taken = step(engine, data, limits)
            if number:
                seconds[name].append(taken)
    dist.destroy_process_group()
    plain = seconds["without"]
    rows = []
    for name, taken in seconds.items():
        ratios = sorted(one / other for one, other in zip(taken, plain, strict=True))
        ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        rows.append([name, f"{statistics.median(taken):.2f}", "" if name == "without" else ratio])
    text = "\n\n".join(
        [
            tables.caption(
                f"python benchmarks/qat.py --size {options.size} --samples {options.samples} --tokens {options.tokens} "
                f"--steps {options.steps}"
            ),
            tables.markdown(["`qat.mode`", "seconds of a step", f"times the step without (aim {AIM})"], rows),
        ]
    )
    print(text)
    if options.write:
        tables.write_section(options.write, "qat", text)


if __name__ == "__main__":
    main()
