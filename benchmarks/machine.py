"""Description of the machine and its load, which every benchmark prints above its tables.

`python benchmarks/machine.py` prints only the description.
"""

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

from verl.utils.host import cpu_cores

_X86_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
_ARM_FLAGS = ("asimd", "sve", "bf16", "i8mm")


def describe() -> dict[str, str]:
    """Return name to text: date, processor, cores, vector features, memory, accelerator, versions, load averages."""
    info = _cpuinfo()
    features = set((info.get("flags") or info.get("Features") or "").split())
    known = _X86_FLAGS if "x86" in platform.machine() else _ARM_FLAGS
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "kind": kind(),
        "processor": f"{info.get('model name', platform.processor() or 'unknown')} ({platform.machine()})",
        "cores": f"{cpu_cores()} usable of {os.cpu_count()}, {torch.get_num_threads()} torch threads",
        "features": " ".join(f"{name}={'yes' if name in features else 'no'}" for name in known),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "accelerator": _accelerator(),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, {_compiler()}",
        "load before": f"{load} (1, 5, 15 minutes): other work on these cores inflates every figure",
    }


def kind() -> str:
    """Name of the processor's class, which distinguishes tables of several machines."""
    features = set((_cpuinfo().get("flags") or "").split())
    if "avx512_bf16" in features:
        return "AVX-512 with bf16"
    if "avx512f" in features:
        return "AVX-512"
    if "avx2" in features:
        return "AVX2"
    return platform.machine()


def header() -> str:
    """Return `describe()` as aligned lines of text."""
    described = describe()
    width = max(map(len, described))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in described.items())


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _accelerator() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return "none"


def _compiler() -> str:
    try:
        return subprocess.run(["gcc", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        return "no gcc"


if __name__ == "__main__":
    print(header())
