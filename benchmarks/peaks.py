"""Memory high-water marks of a run's processes, by what they do."""

from __future__ import annotations

import threading
from collections import defaultdict
from pathlib import Path

import psutil

_MIB = 1 << 10  # /proc counts in KiB
# Words of a command line; the first that occurs tells the role.
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
    """What a process of a run does; `other` where its command line does not tell, such as reward workers."""
    return next((role for word, role in _ROLES if word in command_line), "other")


def peak_mib(status: str) -> int | None:
    """VmHWM, the most memory that was ever resident, from the text of /proc/PID/status; None for a zombie."""
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return None if line is None else int(line.split()[1]) // _MIB


class PeakWatcher:
    """Looks at a process and its descendants twice a second until it is stopped."""

    def __init__(self, pid: int):
        self._root = psutil.Process(pid)
        self._peaks: dict[int, tuple[str, int]] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(0.5):
            self._look()

    def _look(self) -> None:
        try:
            processes = [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in processes:
            try:
                command_line = process.cmdline()
                # Between fork and exec a process is its parent's copy.
                if process != self._root and psutil.Process(process.ppid()).cmdline() == command_line:
                    continue
                # A worker of Ray's is renamed once it knows what it does.
                role = role_of(" ".join(command_line))
                peak = peak_mib(Path(f"/proc/{process.pid}/status").read_text())
            except (psutil.NoSuchProcess, psutil.ZombieProcess, OSError):
                continue
            if peak is not None:
                self._peaks[process.pid] = role, peak

    def stop(self) -> dict[str, list[int]]:
        """Look once more; peaks in MiB by role, the highest first."""
        self._stopped.set()
        self._thread.join()
        self._look()
        by_role: dict[str, list[int]] = defaultdict(list)
        for role, peak in sorted(self._peaks.values(), key=lambda item: -item[1]):
            by_role[role].append(peak)
        return dict(by_role)
