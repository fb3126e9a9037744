"""Memory high-water marks of the processes of a run, by role."""

from __future__ import annotations

import threading
from collections import defaultdict
from pathlib import Path

import psutil

_MIB = 1 << 10  # /proc counts in KiB
# The first of these words that a command line contains determines the role.
_ROLES = (
    ("ray::TrainWorker", "trainer rank"),
    ("ray::vLLMHttpServer", "replica"),
    ("VLLM::", "engine process"),
    ("verl.trainer.main_ppo", "driver"),
    ("raylet", "Ray"),
    ("gcs_server", "Ray"),
    ("ray/", "Ray"),
    ("ray::", "Ray"),
)


def role_of(command_line: str) -> str:
    """Return the role of a process; `other` if its command line does not show it, as for reward workers."""
    return next((role for word, role in _ROLES if word in command_line), "other")


def peak_mib(status: str) -> int | None:
    """Return VmHWM, the peak resident memory in MiB, from the text of /proc/PID/status; None for a zombie."""
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return None if line is None else int(line.split()[1]) // _MIB


class PeakWatcher:
    """Thread that reads the memory peaks of a process and its descendants twice a second until `stop`."""

    def __init__(self, pid: int):
        self._root = psutil.Process(pid)
        self._peaks: dict[int, tuple[str, int]] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(0.5):
            self._read_peaks()

    def _read_peaks(self) -> None:
        try:
            processes = [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in processes:
            try:
                command_line = process.cmdline()
                # Between fork and exec a process is a copy of its parent.
                if process != self._root and psutil.Process(process.ppid()).cmdline() == command_line:
                    continue
                # Ray renames a worker after its actor starts, so the last role read is the right one.
                role = role_of(" ".join(command_line))
                peak = peak_mib(Path(f"/proc/{process.pid}/status").read_text())
            except (psutil.NoSuchProcess, psutil.ZombieProcess, OSError):
                continue
            if peak is not None:
                self._peaks[process.pid] = role, peak

    def stop(self) -> dict[str, list[int]]:
        """Read once more; return the peaks in MiB by role, highest first."""
        self._stopped.set()
        self._thread.join()
        self._read_peaks()
        by_role: dict[str, list[int]] = defaultdict(list)
        for role, peak in sorted(self._peaks.values(), key=lambda item: -item[1]):
            by_role[role].append(peak)
        return dict(by_role)
