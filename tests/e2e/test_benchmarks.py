"""The benchmarks run and print their tables; the figures are not checked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

_SMALL = ["--sizes", "0.8M", "--lengths", "equal", "--prompts", "2"]
# Benchmarks whose runs may join a Ray cluster. The others start Ray themselves or watch its processes.
_JOINS_RAY = ("grpo_step", "overhead")


@pytest.mark.parametrize(
    ("name", "arguments", "rows"),
    [
        ("quantizer", ["--size", "256", "--runs", "3"], ["bf16 copy", "quantize, C kernels", "quantization_error"]),
        (
            "weight_update",
            ["--sizes", "0.8M", "--rounds", "1"],
            [
                "copying the bytes twice",
                "update, quantized by the sender",
                "update, by the receiver",
                "through safetens",
                "delta, lr 1e-06",
                "  0.8M    1e-06",
            ],
        ),
        ("generation", ["--sizes", "0.8M", "--rounds", "1"], ["not quantized", "MXFP8, emulated"]),
        ("grpo_step", [*_SMALL, "--rounds", "1", "--without-trl"], ["| 0.8M "]),
        ("overhead", [*_SMALL, "--steps", "1"], ["| 0.8M "]),
        ("growth", ["--parts", "samples", "--samples", "64", "--steps", "1"], ["| 64 "]),
        ("scale_model", ["--no-check"], ["| Qwen3-235B-A22B | 1024 "]),
    ],
)
def test_benchmark_prints_its_table(request, name, arguments, rows):
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments]
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    if name in _JOINS_RAY:
        environment["RAY_ADDRESS"] = request.getfixturevalue("ray_address")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for row in (*rows, "processor", "date"):
        assert any(line.startswith(row) for line in done.stdout.splitlines()), (row, done.stdout)
