"""Compare weight updates, from the trainer's memory to a serving engine, with copying the bytes of a full update.

    python benchmarks/weight_update.py [--sizes 0.8M 135M] [--rounds 9] [--dtype auto]

Trainer and engines are separate processes, as in a run (one rank, one replica on a CPU), with random weights. Every
round does each of these once, one after the other, so that each ratio compares two timings of the same round:

- copy the bytes of the MXFP8 update twice, into a shared bucket and out of it: the minimum that two processes need;
- full update with `rollout.quantization=ascend`, quantized by the sender, and by the receiver;
- full update without quantization;
- full update through files: write the weights as safetensors, read them, and send them;
- delta after a step that changes every weight by the learning rate, up or down, as Adam's first step does.

The tables have medians over the rounds, and medians of the per-round ratios to the copy. The sender encodes and sends a
bucket while the engine loads the one before, so the parts add up to more than the total. The number of bytes that a
step changes depends on the size of the weights: the default of `--std` is that of SmolLM2-135M's linear layers.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import machine
import models
import ray
import tables
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from verl.config import ActorConfig, ActorRolloutRefConfig, FSDPConfig, ModelConfig, RolloutConfig
from verl.single_controller.worker_group import WorkerGroup
from verl.trainer.ppo.trainer_sender import TrainerSender
from verl.utils.dtypes import choose_dtype
from verl.utils.host import cpu_environment
from verl.workers.rollout.quantization import get_scheme
from verl.workers.rollout.replica import vLLMReplica
from verl.workers.rollout.vllm_rollout.engine_args import engine_environment
from verl.workers.train_worker import TrainWorker
from verl.workers.weight_sync.driver import update_weights
from verl.workers.weight_sync.sender import WeightSender

TARGET = 2.0
COPY = "copying the bytes twice"
SENDER = "update, quantized by the sender"
LEARNING_RATES = (1e-6, 1e-5, 1e-4)
# Standard deviations: of transformers' random weights, and of SmolLM2-135M's linear layers (0.18 to 0.28; embeddings:
# 0.14).
RANDOM_STD, SMOLLM2_STD = 0.02, 0.2
PARTS = ("begin_s", "encode_s", "send_s", "load_s", "finish_s", "total_s")


class MovingWorker(TrainWorker):
    """Trainer rank whose weights can be changed without training."""

    def move(self, learning_rate: float, seed: int) -> None:
        """Change every weight by `learning_rate`, up or down at random."""
        generator = torch.Generator().manual_seed(seed)
        for weight in self._local_weights():
            up = torch.randint(0, 2, weight.shape, generator=generator, dtype=torch.int8)
            weight += learning_rate * (2 * up - 1)

    def scale(self, factor: float) -> None:
        """Multiply every matrix by `factor`, with noise that moves weights off bfloat16 values, as training does."""
        generator = torch.Generator().manual_seed(0)
        for weight in self._local_weights():
            if weight.dim() > 1:
                weight *= factor * (1 + 0.01 * torch.randn(weight.shape, generator=generator))

    def _local_weights(self) -> Iterator[torch.Tensor]:
        for parameter in self._actor.engine.model.parameters():
            data = parameter.data
            yield data.to_local() if isinstance(data, DTensor) else data


@dataclass
class Pair:
    """A trainer and an engine with the same settings of weight updates."""

    config: ActorRolloutRefConfig
    trainer: WorkerGroup[MovingWorker]
    replica: vLLMReplica
    version: int = 0

    async def update(self, sender: Any = None, *, base: int | None = None) -> dict[str, Any]:
        self.version += 1
        sender = sender or TrainerSender(self.trainer)
        return (await update_weights(sender, [self.replica], self.version, base=base)).metrics

    async def delta(self) -> dict[str, Any]:
        return await self.update(base=self.version)


async def start(model_dir: Path, rollout: RolloutConfig, dtype: str) -> Pair:
    """Start trainer and engine, and send the first full update."""
    model = ModelConfig(path=str(model_dir), enable_gradient_checkpointing=False)
    actor = ActorConfig(use_dynamic_bsz=True, fsdp_config=FSDPConfig(dtype="float32"))
    config = ActorRolloutRefConfig(model=model, actor=actor, rollout=rollout)
    trainer = WorkerGroup(
        MovingWorker,
        [{"num_cpus": 0, "runtime_env": {"env_vars": cpu_environment(threads=2)}}],
        world_size=1,
        config=config,
        device="cpu",
        total_training_steps=1,
        max_model_len=64,
        with_ref=False,
        seed=0,
        rollout_dtype=dtype,
    )
    server = {
        "rollout": rollout,
        "model": model,
        "device": "cpu",
        "dtype": dtype,
        "prompt_length": 32,
        "response_length": 32,
    }
    environment = engine_environment(device="cpu", threads=2, tensor_parallel_size=1)
    replica = vLLMReplica(0, server, {"num_cpus": 0}, environment)
    host = "127.0.0.1"
    port = await trainer.rank(0, TrainWorker.reserve_port, host)
    await asyncio.gather(trainer.all(TrainWorker.setup, host, port, host), replica.start())
    pair = Pair(config, trainer, replica)
    await pair.update()
    return pair


class FileSender:
    """Sender of the weights in a directory."""

    def __init__(self, directory: Path, config: ActorRolloutRefConfig, dtype: torch.dtype, bucket_bytes: int):
        self._sender = WeightSender(bucket_bytes)
        self._directory, self._dtype = directory, dtype
        self._scheme = get_scheme(config.rollout, str(config.model.path))

    async def begin_export(self, version: int, base: int | None) -> None:
        assert base is None
        weights = load_file(self._directory / "model.safetensors")
        cast = ((name, tensor.to(self._dtype)) for name, tensor in weights.items())
        self._sender.begin(version, self._scheme.encode(cast))

    async def next_bucket(self) -> dict[str, Any]:
        return self._sender.next_bucket()

    async def finish_export(self) -> dict[str, Any]:
        report = self._scheme.pop_report()
        manifest, seconds = self._sender.manifest(), self._sender.seconds
        sizes = {"full_bytes": self._sender.nbytes}
        return {"manifest": manifest, "seconds": seconds, "encode": report.seconds, "errors": {}, **sizes}

    async def abort_export(self) -> None:
        self._sender.abort()


class Copy:
    """Copy `nbytes` from private memory to a second buffer, and from there to a third."""

    def __init__(self, nbytes: int):
        self._buffers = [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(3)]

    def __call__(self) -> None:
        source, bucket, target = self._buffers
        bucket.copy_(source)
        target.copy_(bucket)


async def timed(call: Callable[[], Awaitable[Any]]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = await call()
    return time.perf_counter() - started, result


async def measure(size: str, dtype: str, rounds: int, std: float, work: Path) -> dict[str, Any]:
    """Measure one model size, print its table and return the records (seconds, metrics) of every row."""
    model_dir = models.write_model(size, work / size)
    base = RolloutConfig(
        quantization="ascend", tensor_model_parallel_size=1, dtype=dtype, enforce_eager=True, max_num_seqs=16
    )
    pairs = {
        SENDER: await start(model_dir, base, dtype),
        "update, by the receiver": await start(model_dir, replace(base, quantization_side="receiver"), dtype),
        "update, not quantized": await start(model_dir, replace(base, quantization=None), dtype),
    }
    first = pairs[SENDER]
    for pair in pairs.values():
        await pair.trainer.all(MovingWorker.scale, std / RANDOM_STD)
    metrics = await first.update()
    copy = Copy(int(metrics["weight_update/MiB"] * 2**20))
    bucket_bytes = base.checkpoint_engine.update_weights_bucket_megabytes << 20

    async def through_files() -> dict[str, Any]:
        await first.trainer.all(TrainWorker.export_float32, str(work / "exported"))
        return await first.update(FileSender(work / "exported", first.config, getattr(torch, dtype), bucket_bytes))

    async def copied() -> dict[str, Any]:
        copy()
        return {}

    calls: dict[str, Callable[[], Awaitable[dict[str, Any]]]] = {COPY: copied}
    calls |= {name: pair.update for name, pair in pairs.items()}
    calls["through safetensors files"] = through_files
    records: dict[str, list[tuple[float, dict[str, Any]]]] = {name: [] for name in calls}
    rates = {f"delta, lr {rate:g}": rate for rate in LEARNING_RATES}
    records |= {name: [] for name in rates}
    for number in range(rounds + 1):
        for name, call in calls.items():
            outcome = await timed(call)
            if number:  # the first round only warms up
                records[name].append(outcome)
        # A delta needs a base that the trainer itself sent; the weights from files are not.
        await first.update()
        for name, rate in rates.items():
            await first.trainer.all(MovingWorker.move, rate, number)
            outcome = await timed(first.delta)
            if number:
                records[name].append(outcome)
    for pair in pairs.values():
        await pair.replica.stop()
        pair.trainer.stop()
    print_table(size, dtype, records)
    return records


def ratio(records: dict[str, list[tuple[float, dict[str, Any]]]], name: str) -> float:
    """Return the median over the rounds of the ratio to the copy."""
    return statistics.median(a / b for (a, _), (b, _) in zip(records[name], records[COPY], strict=True))


def print_table(size: str, dtype: str, records: dict[str, list[tuple[float, dict[str, Any]]]]) -> None:
    rounds = len(records[COPY])
    print(f"\n{size} parameters, engine in {dtype}, median of {rounds} rounds, ms")
    heads = [part.removesuffix("_s") for part in PARTS[:-1]]
    print(f"{'':34}{'total':>9}{'x copy':>8}" + "".join(f"{head:>8}" for head in heads) + f"{'MiB':>8}")
    for name, record in records.items():
        total = statistics.median(seconds for seconds, _ in record)
        line = f"{name:<34}{total * 1e3:>9.1f}{ratio(records, name):>8.2f}"
        for part in PARTS[:-1]:
            values = [metrics[f"weight_update/{part}"] for _, metrics in record if metrics]
            line += f"{statistics.median(values) * 1e3:>8.1f}" if values else " " * 8
        mebibytes = [metrics["weight_update/MiB"] for _, metrics in record if metrics]
        print(line + (f"{statistics.median(mebibytes):>8.2f}" if mebibytes else ""))


async def run(sizes: list[str], dtype: str, rounds: int, std: float) -> dict[str, dict[str, Any]]:
    found = {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as work:
            found[size] = await measure(size, dtype, rounds, std, Path(work))
    return found


def of_full(records: dict[str, list[tuple[float, dict[str, Any]]]], name: str) -> tuple[float, float]:
    """Return bytes and seconds of a delta as shares of a full update, medians over the rounds."""
    pairs = list(zip(records[name], records[SENDER], strict=True))
    sent = (a["weight_update/MiB"] / b["weight_update/MiB"] for (_, a), (_, b) in pairs)
    return statistics.median(sent), statistics.median(a / b for (a, _), (b, _) in pairs)


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown table of all rows."""
    rows = []
    for size, records in found.items():
        for name, record in records.items():
            total = statistics.median(seconds for seconds, _ in record)
            sent = [metrics["weight_update/MiB"] for _, metrics in record if metrics]
            shares = [f"{share:.2%}" for share in of_full(records, name)] if sent else ["", ""]
            mebibytes = f"{statistics.median(sent):.2f}" if sent else ""
            rows.append([size, name, f"{total * 1e3:.0f}", f"{ratio(records, name):.1f}", mebibytes, *shares])
    head = ["model", "case", "ms", "x copying", "MiB", "bytes / full update", "time / full update"]
    return tables.markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", nargs="+", default=list(models.CONFIGS), choices=list(models.CONFIGS))
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds, after one warm-up round")
    parser.add_argument("--std", type=float, default=SMOLLM2_STD, help="standard deviation of the weights")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="dtype of the engine")
    tables.add_write_option(parser)
    arguments = parser.parse_args()
    print(machine.header())
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        dtype = choose_dtype("cpu", arguments.dtype).name
        found = asyncio.run(run(arguments.sizes, dtype, arguments.rounds, arguments.std))
    finally:
        ray.shutdown()
    print(f"\n{machine.kind()}: full update, relative to copying its bytes twice (target for 135M: {TARGET:.0f})")
    for size, records in found.items():
        print(f"  {size:<6}{ratio(records, SENDER):>7.2f}")
    print("delta, relative to a full update's bytes and time (target for 135M at 1e-6: 1 %, 0.5)")
    for size, records in found.items():
        for name in (name for name in records if name.startswith("delta")):
            sent, seconds = of_full(records, name)
            print(f"  {size:<6}{name.split()[-1]:>7}{sent:>9.2%}{seconds:>7.2f}")
    if arguments.write:
        command = f"benchmarks/weight_update.py --sizes {' '.join(arguments.sizes)} --rounds {arguments.rounds}"
        tables.write_section(arguments.write, "weight_update", f"{tables.caption(command)}\n\n{table(found)}")


if __name__ == "__main__":
    sys.exit(main())
