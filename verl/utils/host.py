"""The host: CPU cores and features, environment of CPU processes, free memory. Imports no torch."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

# One arena: memory freed by the backward pass's thread is useful to the other threads. Large tensors are kept like
# small ones. A tensor may reuse any hole that is large enough: by default jemalloc keeps a hole 64 times too large
# unused, and with varying lengths the number of such holes grows in every step.
_JEMALLOC = "narenas:1,oversize_threshold:0,dirty_decay_ms:-1,lg_extent_max_active_fit:40"


def cpu_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_features(cpuinfo: str | None = None) -> frozenset[str]:
    """Return the instruction-set flags of the first core, with their names in `/proc/cpuinfo`.

    Args:
        cpuinfo: text to read instead of `/proc/cpuinfo`.
    """
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


def thread_environment(threads: int) -> dict[str, str]:
    """Return the environment of a process that shares its cores with other processes.

    Idle OpenMP threads block. By default they spin, which takes time from the other processes.
    """
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


def cpu_environment(threads: int) -> dict[str, str]:
    """Return `thread_environment` plus jemalloc, for a process whose tensors are in the host's memory.

    glibc returns the memory of each tensor to the kernel and gets it back page by page; getting a page costs more than
    filling it. If glibc is told to keep the memory, its heap grows, because the next tensor rarely fits a hole. An
    allocator that the user sets in LD_PRELOAD, and MALLOC_CONF, are not replaced.
    """
    return {**thread_environment(threads), **_allocator()}


def _allocator() -> dict[str, str]:
    preloaded = os.environ.get("LD_PRELOAD", "")
    spec = importlib.util.find_spec("ray")
    # Ray ships it for its own processes, built for pages of 4 KiB.
    library = Path(spec.origin).parent / "core" / "libjemalloc.so" if spec and spec.origin else None
    if "malloc" in preloaded or library is None or not library.is_file() or os.sysconf("SC_PAGE_SIZE") != 4096:
        return {}
    return {
        "LD_PRELOAD": ":".join(filter(None, [str(library), preloaded])),
        "MALLOC_CONF": os.environ.get("MALLOC_CONF", _JEMALLOC),
    }


def available_memory_bytes(*, root: Path = Path("/")) -> int | None:
    """Return the bytes of host memory that new processes can use without swapping.

    The limit of this container counts. None if the system does not report it.
    """
    limits = [_meminfo_bytes(root, "MemAvailable"), _cgroup_room_bytes(root)]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def used_memory_bytes(*, root: Path = Path("/")) -> int | None:
    """Return the bytes of the host's memory in use, without page cache that can be dropped; None if not reported."""
    total, available = _meminfo_bytes(root, "MemTotal"), _meminfo_bytes(root, "MemAvailable")
    return None if total is None or available is None else total - available


def _meminfo_bytes(root: Path, name: str) -> int | None:
    try:
        text = (root / "proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _cgroup_room_bytes(root: Path) -> int | None:
    """Return the bytes left by cgroup v2; page cache that can be dropped counts as free."""
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
