"""Compare generation in MXFP8, emulated on a CPU, with generation without quantization: tokens/s and memory.

    python benchmarks/generation.py [--sizes 0.8M 135M] [--rounds 5] [--dtype auto]

The emulation shows the values that an Ascend 950 computes. It costs time and memory on a CPU; this benchmark measures
how much. Both engines run at the same time, each in its own process. In every round, first one and then the other
generates the same number of tokens.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
import models

from verl.utils.dtypes import choose_dtype
from verl.utils.host import cpu_cores, cpu_environment

KINDS = {"not quantized": None, "MXFP8, emulated": "ascend"}
# By model: number of concurrent requests, tokens per request.
LOADS = {"0.8M": (256, 16), "135M": (32, 16)}
PROMPT = 16


def serve(model_dir: Path, quantization: str | None, dtype: str, requests: int, tokens: int) -> None:
    """Run one engine: print a line of JSON when it is ready, then generate once per line of standard input.

    Each generation prints a line of JSON with its seconds.
    """
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    from verl.config import RolloutConfig
    from verl.utils.vllm import plugin
    from verl.workers.rollout.quantization import get_scheme

    plugin.register()
    scheme = get_scheme(RolloutConfig(quantization=quantization, tensor_model_parallel_size=1), str(model_dir))
    engine = LLM(
        model=str(model_dir),
        dtype=dtype,
        load_format="dummy",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=requests,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        kv_cache_memory_bytes=512 << 20,
        **scheme.format.engine_overrides("cpu"),
    )
    prompts = [TokensPrompt(prompt_token_ids=[3 + (i + j) % 100 for j in range(PROMPT)]) for i in range(requests)]
    parameters = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    reply({"resident": resident_bytes()})
    for _ in sys.stdin:
        started = time.perf_counter()
        engine.generate(prompts, parameters, use_tqdm=False)
        reply({"seconds": time.perf_counter() - started})


def reply(record: dict) -> None:
    os.write(_replies, (json.dumps(record) + "\n").encode())


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes."""
    fields = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in fields if line.startswith("VmRSS:")).split()[1]) * 1024


class Engine:
    """A process that runs `serve`."""

    def __init__(self, size: str, model_dir: Path, quantization: str | None, dtype: str):
        requests, tokens = LOADS[size]
        environment = {
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            **cpu_environment(cpu_cores()),
        }
        command = [sys.executable, __file__, "--serve", str(model_dir), quantization or "", dtype]
        # The log is shown only if the process fails.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (open as long as the process)
        self._process = subprocess.Popen(
            [*command, str(requests), str(tokens)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self.resident = self._reply()["resident"]

    def _reply(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._log.seek(0)
            raise SystemExit(f"{self._log.read()[-3000:]}\nthe engine process ended with status {status}")
        return json.loads(line)

    def generate(self) -> float:
        """Generate once for all requests and return the seconds."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._reply()["seconds"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)


def measure(size: str, dtype: str, rounds: int, work: Path) -> None:
    """Print the table of one model size."""
    model_dir = models.write_model(size, work / size)
    engines = {kind: Engine(size, model_dir, quantization, dtype) for kind, quantization in KINDS.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in engines}
    for number in range(rounds + 1):
        for kind, engine in engines.items():
            elapsed = engine.generate()
            if number:  # the first round only warms up
                seconds[kind].append(elapsed)
    for engine in engines.values():
        engine.close()
    requests, tokens = LOADS[size]
    print(f"\n{size} parameters in {dtype}, {requests} requests x {tokens} tokens, median of {rounds} rounds")
    print(f"{'':20}{'tokens/s':>10}{'speed':>10}{'resident MiB':>14}")
    unquantized = seconds[next(iter(KINDS))]
    for kind, values in seconds.items():
        speed = requests * tokens / statistics.median(values)
        ratio = statistics.median(b / a for a, b in zip(values, unquantized, strict=True))
        print(f"{kind:<20}{speed:>10.0f}{ratio:>10.2f}{engines[kind].resident / 2**20:>14.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", nargs="+", default=list(models.CONFIGS), choices=list(models.CONFIGS))
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one warm-up round")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="dtype of the engine")
    arguments = parser.parse_args()
    print(machine.header())
    dtype = choose_dtype("cpu", arguments.dtype).name
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as work:
            measure(size, dtype, arguments.rounds, Path(work))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        # vLLM prints to standard output, so replies go to a copy of it and the descriptor itself goes to stderr.
        _replies = os.dup(1)
        os.dup2(2, 1)
        directory, name, engine_dtype, count, length = sys.argv[2:]
        serve(Path(directory), name or None, engine_dtype, int(count), int(length))
    else:
        main()
