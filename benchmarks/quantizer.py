"""Compare the MXFP8 quantizer with a bf16 copy of the same tensor and with other implementations of it.

    python benchmarks/quantizer.py [--size 4096] [--threads 2] [--runs 31]

Every round times each candidate once, one after the other, so that each ratio compares two timings of the same round.
The first table has medians over the rounds, and medians of the per-round ratios to the copy. The second table has the
processor time of one thread, which other work on the machine disturbs less. Before the timing, all candidates must
produce the same bits.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import machine
import torch

from verl.utils.native import library as native
from verl.utils.quantization import mxfp8

TARGET = 3.0


def torch_operators(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize with floating-point operators over the full tensor, the simplest implementation."""
    blocks = x.reshape(-1, mxfp8.MX_BLOCK_SIZE).float()
    amax = blocks.abs().amax(-1, keepdim=True)
    exponent = (torch.floor(torch.log2(amax)) - 8).clamp(-127, 127)
    values = (blocks * torch.exp2(-exponent)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return values.reshape(x.shape), (exponent + 127).to(torch.uint8).reshape(x.shape[0], -1)


def candidates(x: torch.Tensor) -> dict[str, Callable]:
    """Return name to call: the copies for comparison, and calls that quantize, dequantize or check x."""
    half, copied = x.bfloat16(), torch.empty_like(x, dtype=torch.bfloat16)
    out = mxfp8.mxfp8_quantize(x)
    values, scales = mxfp8.mxfp8_quantize(x)
    restored, restored_float = torch.empty_like(half), torch.empty_like(x, dtype=torch.float32)
    compiled = torch.compile(mxfp8._quantize_blocks, dynamic=True)
    blocks = x.reshape(-1, mxfp8.MX_BLOCK_SIZE)

    def without_kernels():
        kept, mxfp8._native_library = mxfp8._native_library, lambda device: None
        try:
            return mxfp8.mxfp8_quantize(x)
        finally:
            mxfp8._native_library = kept

    return {
        "bf16 copy": lambda: copied.copy_(half),
        "bf16 copy to new memory": lambda: half.clone(),
        "quantize, C kernels, into `out`": lambda: mxfp8.mxfp8_quantize(x, out=out),
        "quantize, C kernels": lambda: mxfp8.mxfp8_quantize(x),
        "quantize, torch.compile": lambda: compiled(blocks, 0),
        "quantize, no compiler": without_kernels,
        "quantize, plain torch operators": lambda: torch_operators(x),
        "dequantize to bf16, into `out`": lambda: mxfp8.mxfp8_dequantize(values, scales, torch.bfloat16, out=restored),
        "dequantize to float32, into `out`": lambda: mxfp8.mxfp8_dequantize(values, scales, out=restored_float),
        "dequantize to float32": lambda: mxfp8.mxfp8_dequantize(values, scales),
        "quantization_error": lambda: mxfp8.quantization_error(x, values, scales),
        "cast to bf16 (for scale)": lambda: restored.copy_(x),
    }


def measure(calls: dict[str, Callable], runs: int, clock: Callable[[], float]) -> dict[str, tuple[float, float, float]]:
    """Return name to (median ms, fastest ms, median over the rounds of the ratio to the first call)."""
    for call in calls.values():
        call()
        call()
    rounds = []
    for _ in range(runs):
        times = {}
        for name, call in calls.items():
            start = clock()
            call()
            times[name] = (clock() - start) * 1e3
        rounds.append(times)
    first = next(iter(calls))
    return {
        name: (
            statistics.median(r[name] for r in rounds),
            min(r[name] for r in rounds),
            statistics.median(r[name] / r[first] for r in rounds),
        )
        for name in calls
    }


def check_bits(x: torch.Tensor, calls: dict[str, Callable]) -> None:
    """Check that all candidates quantize to the same bits; otherwise the table would compare different results.

    A wrong result of torch.compile, which is not used on a CPU, only removes this candidate from `calls`, with a
    message.

    Raises:
        SystemExit: another candidate produces other bits.
    """
    codes, scales = (part.view(torch.uint8).reshape(-1) for part in calls["quantize, C kernels"]())
    for name, call in list(calls.items()):
        if name.startswith("quantize"):
            other = [part.view(torch.uint8).reshape(-1) for part in call()]
            if not (torch.equal(other[0], codes) and torch.equal(other[1], scales)):
                message = f"{name}: its bits differ from those of the C kernels for {x.dtype}"
                if name != "quantize, torch.compile":
                    raise SystemExit(message)
                print(f"\n{message}; it is not in the tables")
                del calls[name]


def first_call() -> tuple[float, float]:
    """Measure the seconds of a process's first call: with an empty cache (runs the C compiler), then a filled one."""
    code = (
        "import time, torch; from verl.utils.quantization import mxfp8; x = torch.ones(64, 64); "
        "start = time.perf_counter(); mxfp8.mxfp8_quantize(x); print(time.perf_counter() - start)"
    )
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "XDG_CACHE_HOME": cache}
        command = [sys.executable, "-c", code]
        cold, warm = (float(subprocess.check_output(command, env=environment, text=True)) for _ in range(2))
    return cold, warm


def small_call(x: torch.Tensor, repeats: int = 2000) -> float:
    """Measure the microseconds of a call on a tensor so small that only the overhead of the call counts."""
    start = time.perf_counter()
    for _ in range(repeats):
        mxfp8.mxfp8_quantize(x)
    return (time.perf_counter() - start) / repeats * 1e6


def print_table(title: str, rows: dict[str, tuple[float, float, float]]) -> None:
    print(f"\n{title}\n{'':36}{'median ms':>10}{'fastest':>10}{'x copy':>12}")
    for name, (median, fastest, ratio) in rows.items():
        print(f"{name:<36}{median:>10.2f}{fastest:>10.2f}{ratio:>12.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the tensor")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of the first table")
    parser.add_argument("--runs", type=int, default=31, help="rounds per table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(machine.header())
    if native.kernels() is None:
        raise SystemExit("the C kernels are not available: install a C compiler")
    cold, warm = first_call()
    print(f"\nfirst call of a process: {cold:.2f} s with an empty cache, {warm * 1e3:.0f} ms with a filled one")
    print(f"call on a 32 x 32 tensor: {small_call(torch.ones(32, 32)):.0f} us")

    verdict = []
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        generator = torch.Generator().manual_seed(0)
        x = (torch.randn(arguments.size, arguments.size, generator=generator) * 0.02).to(dtype)
        calls = candidates(x)
        check_bits(x, calls)
        name = str(dtype).removeprefix("torch.")
        title = f"{arguments.size} x {arguments.size} {name}"
        torch.set_num_threads(arguments.threads)
        wall = measure(calls, arguments.runs, time.perf_counter)
        print_table(f"{title}, {arguments.threads} threads, wall clock", wall)
        torch.set_num_threads(1)
        alone = measure(calls, max(arguments.runs // 3, 3), time.process_time)
        print_table(f"{title}, 1 thread, processor time", alone)
        torch.set_num_threads(arguments.threads)
        ours = "quantize, C kernels, into `out`"
        verdict.append((name, wall[ours][2], alone[ours][2]))

    print(f"\n{machine.kind()}: quantization time relative to a bf16 copy of the same tensor (target {TARGET:.0f})")
    for name, ratio, ratio_alone in verdict:
        met = "met" if max(ratio, ratio_alone) <= TARGET else "missed"
        print(f"  {name:<10}{ratio:>6.2f} by wall clock, {ratio_alone:.2f} by processor time: {met}")


if __name__ == "__main__":
    main()
