"""The machine a run sees: device, collective backend, dtype that is fast on it, memory. Imports no torch by itself."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from verl.utils.dtypes import DTYPE_NAMES

if TYPE_CHECKING:
    import torch

DEVICES = ("cpu", "cuda", "npu")
_BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
_VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}
# One arena, as what the backward pass's thread frees is of use to the others, and large tensors are kept as small ones
# are. A tensor takes any hole that it fits into: by default one 64 times too large stays, and where lengths vary there
# are more of them after each step.
_JEMALLOC = "narenas:1,oversize_threshold:0,dirty_decay_ms:-1,lg_extent_max_active_fit:40"
# Without one of these a CPU computes bfloat16 by converting, several times slower than float32.
_CPU_BFLOAT16 = ("avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class DtypeChoice:
    """A torch dtype's name (`float32`, `bfloat16`), and why it is that one."""

    name: str
    why: str


def detect_device(requested: str = "auto", *, root: Path = Path("/")) -> str:
    """`cpu`, `cuda` or `npu`: what was asked for if it is there, or for `auto` the accelerator if there is one.

    Args:
        requested: `auto` or a device.
        root: where `dev` lies.

    Raises:
        ValueError: an unknown device, or one that this machine or this installation lacks.
    """
    if requested == "auto":
        return next((device for device in ("cuda", "npu") if why_not(device, root=root) is None), "cpu")
    if requested not in DEVICES:
        raise ValueError(f"trainer.device={requested}: use auto, {', '.join(DEVICES)}")
    reason = why_not(requested, root=root)
    if reason is not None:
        raise ValueError(f"trainer.device={requested}: {reason}; use auto or cpu, or install what is missing")
    return requested


def why_not(device: str, *, root: Path = Path("/")) -> str | None:
    """Why `device` cannot be used here, or None if it can."""
    if device == "cpu":
        return None
    if count_devices(device, root=root) == 0:
        name, node = ("NVIDIA", "nvidia0") if device == "cuda" else ("Ascend", "davinci0")
        return (
            f"this machine shows no {name} device (no {root / 'dev' / node}, or its visible-devices variable is empty)"
        )
    if device == "npu":
        return None if importlib.util.find_spec("torch_npu") else "the package torch_npu is not installed"
    version = _torch_version()
    if version is None:
        return "torch is not installed"
    return f"the installed torch {version} is a build for the CPU" if version.endswith("+cpu") else None


def count_devices(device: str, *, root: Path = Path("/")) -> int:
    """How many devices of a kind this machine shows; for `cpu` the cores that this process may use."""
    if device == "cpu":
        return cpu_cores()
    pattern = {"cuda": r"nvidia\d+", "npu": r"davinci\d+"}[device]
    folder = root / "dev"
    nodes = [entry for entry in os.listdir(folder) if re.fullmatch(pattern, entry)] if folder.is_dir() else []
    visible = visible_devices(device)
    return len(nodes) if visible is None else min(len(nodes), len(visible))


def visible_devices(device: str) -> list[str] | None:
    """Ids of the accelerators that this process is restricted to, None where it is not."""
    visible = os.environ.get(_VISIBLE[device])
    return None if visible is None else [part.strip() for part in visible.split(",") if part.strip() not in ("", "-1")]


def devices_environment(device: str, ids: Iterable[str] | None) -> dict[str, str]:
    """Environment of a Ray worker that sees these accelerators whether or not it reserves them; None for all."""
    shown = {} if ids is None else {_VISIBLE[device]: ",".join(ids)}
    return {f"RAY_EXPERIMENTAL_NOSET_{_VISIBLE[device]}": "1", **shown}


def dist_backend(device: str) -> str:
    """The torch.distributed backend of a device."""
    if device not in _BACKENDS:
        raise ValueError(f"device={device!r}: use one of {', '.join(_BACKENDS)}")
    return _BACKENDS[device]


def cpu_features(cpuinfo: str | None = None) -> frozenset[str]:
    """Instruction-set flags of the first core, as `/proc/cpuinfo` (or `cpuinfo`, its text) names them."""
    if cpuinfo is None:
        try:
            cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return frozenset()
    for line in cpuinfo.splitlines():
        name, _, flags = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(flags.split())
    return frozenset()


def choose_dtype(device: str, requested: str = "auto", *, cpuinfo: str | None = None) -> DtypeChoice:
    """The dtype to compute in: what was asked for, or for `auto` the one that is fast on the device.

    Args:
        requested: `auto`, `float32` (`fp32`) or `bfloat16` (`bf16`).
        cpuinfo: text in the place of `/proc/cpuinfo`.

    Raises:
        ValueError: another dtype.
    """
    if requested != "auto":
        if requested not in DTYPE_NAMES:
            raise ValueError(f"dtype={requested!r}: use auto, float32 or bfloat16")
        return DtypeChoice(DTYPE_NAMES[requested], "as configured")
    if device != "cpu":
        return DtypeChoice("bfloat16", f"auto: {device} computes bfloat16 natively")
    native = [flag for flag in _CPU_BFLOAT16 if flag in cpu_features(cpuinfo)]
    if native:
        return DtypeChoice("bfloat16", f"auto: this CPU has {native[0]}")
    return DtypeChoice("float32", f"auto: this CPU has neither {' nor '.join(_CPU_BFLOAT16)}, bfloat16 would be slow")


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_environment(threads: int) -> dict[str, str]:
    """Environment variables for a process that computes on cores that other processes use by turns.

    Threads that wait sleep: by default they spin.
    """
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


def cpu_environment(threads: int) -> dict[str, str]:
    """`thread_environment` for a process whose tensors are in the host's memory: jemalloc allocates it.

    glibc gives each tensor's memory back and gets it again page by page, and a page costs more to get than to fill.
    Told to keep it, its heap grows, for the next tensor rarely fits where one was. An allocator of the user's own in
    LD_PRELOAD stays, and so does MALLOC_CONF.
    """
    return {**thread_environment(threads), **_allocator()}


def _allocator() -> dict[str, str]:
    preloaded = os.environ.get("LD_PRELOAD", "")
    spec = importlib.util.find_spec("ray")
    # Ray brings it along for its own processes, built for pages of 4 KiB.
    library = Path(spec.origin).parent / "core" / "libjemalloc.so" if spec and spec.origin else None
    if "malloc" in preloaded or library is None or not library.is_file() or os.sysconf("SC_PAGE_SIZE") != 4096:
        return {}
    return {
        "LD_PRELOAD": ":".join(filter(None, [str(library), preloaded])),
        "MALLOC_CONF": os.environ.get("MALLOC_CONF", _JEMALLOC),
    }


def available_memory_bytes(*, root: Path = Path("/")) -> int | None:
    """Host memory that new processes can take without swapping, the limit of this container included.

    Returns:
        bytes; None where the system does not tell.
    """
    limits = [_meminfo_bytes(root, "MemAvailable"), _cgroup_room_bytes(root)]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _meminfo_bytes(root: Path, name: str) -> int | None:
    try:
        text = (root / "proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _cgroup_room_bytes(root: Path) -> int | None:
    """What cgroup v2 leaves; page cache that can be dropped counts as free."""
    folder = root / "sys/fs/cgroup"
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        stat = (folder / "memory.stat").read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    cached = re.search(r"^inactive_file (\d+)", stat, re.MULTILINE)
    return max(0, int(limit) - used + (int(cached[1]) if cached else 0))


def _torch_version() -> str | None:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_device(device: str, index: int | None = None) -> torch.device:
    """The `torch.device` of a device name; imports torch, and torch_npu for an NPU."""
    import torch

    if device == "npu":
        import torch_npu  # noqa: F401  (registers the device)
    return torch.device(device) if device == "cpu" or index is None else torch.device(device, index)
