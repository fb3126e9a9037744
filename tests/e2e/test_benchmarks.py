"""The benchmarks run and print their tables; what they measure is for people to read."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

_SMALL = ["--sizes", "0.8M", "--lengths", "equal", "--prompts", "2"]


@pytest.mark.parametrize(
    ("name", "arguments", "rows"),
    [
        ("quantizer", ["--size", "256", "--runs", "3"], ["bf16 copy", "quantize, C kernels", "quantization_error"]),
        (
            "weight_update",
            ["--sizes", "0.8M", "--rounds", "1"],
            [
                "copying its bytes twice",
                "update, quantized by the sender",
                "update, by the receiver",
                "through safetens",
            ],
        ),
        ("generation", ["--sizes", "0.8M", "--rounds", "1"], ["not quantized", "MXFP8, emulated"]),
        ("grpo_step", [*_SMALL, "--rounds", "1", "--without-trl"], ["| 0.8M "]),
        ("overhead", [*_SMALL, "--steps", "1"], ["| 0.8M "]),
        ("growth", ["--parts", "samples", "--samples", "64", "--steps", "1"], ["| 64 "]),
        ("scale_model", ["--no-check"], ["| Qwen3-235B-A22B | 1024 "]),
    ],
)
def test_benchmark(name, arguments, rows):
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for row in (*rows, "processor", "date"):
        assert any(line.startswith(row) for line in done.stdout.splitlines()), (row, done.stdout)
