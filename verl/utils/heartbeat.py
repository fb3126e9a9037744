"""Signs of life of a process: a thread tells the driver every few seconds that the process runs.

The thread does not depend on the work of the process, so a long computation is not mistaken for a hang. It stops if the
process is stopped (SIGSTOP), or if a native function keeps Python's global lock.

The driver opens a `Beacon` (`verl.trainer.ppo.watchdog`) and passes it to its processes, in an environment variable if
they start further processes by themselves. SIGUSR1 makes a process write the stacks of its Python threads to a file in
`Beacon.directory`, even inside native code.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import logging
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

VARIABLE = "VERL_HEARTBEAT"
_CONNECT_S = 30.0
_beacon: Beacon | None = None
_file: IO[str] | None = None
_sending_pid: int | None = None  # a forked process has this module, but not the thread


@dataclass(frozen=True)
class Beacon:
    """The place to which processes send their signs of life.

    Attributes:
        host, port: address of the driver.
        key: secret of the run.
        interval_s: seconds between two signs of life.
        directory: absolute path of the directory for stacks.
    """

    host: str
    port: int
    key: str
    interval_s: float
    directory: str


def set_beacon(beacon: Beacon | None) -> None:
    """Set the beacon for processes that this process starts from now on."""
    global _beacon
    _beacon = beacon


def current_beacon() -> Beacon | None:
    """Return the beacon of the run; None if its processes are not watched."""
    return _beacon


def heartbeat_environment(role: str) -> dict[str, str]:
    """Return the environment with which a process, and processes that it starts, call `send_heartbeats`.

    Args:
        role: name of the process for messages, for example `trainer rank 0`.
    """
    return {} if _beacon is None else {VARIABLE: json.dumps({"role": role, **dataclasses.asdict(_beacon)})}


def send_heartbeats_from_environment(part: str = "") -> None:
    """Call `send_heartbeats` as `heartbeat_environment` asks for; no effect without it.

    Args:
        part: name of this process if the role has several ones.
    """
    if value := os.environ.get(VARIABLE):
        fields = json.loads(value)
        role = fields.pop("role")
        send_heartbeats(Beacon(**fields), f"{role} ({part})" if part else role)


def send_heartbeats(beacon: Beacon | None, role: str) -> None:
    """Send signs of life from now on, and write stacks on SIGUSR1; no effect if called again, or without a beacon."""
    global _sending_pid
    if beacon is None or _sending_pid == os.getpid():
        return
    _sending_pid = os.getpid()
    _write_stacks_on_signal(Path(beacon.directory), role)
    threading.Thread(target=_send, args=(beacon, role), name="heartbeat", daemon=True).start()


def _write_stacks_on_signal(directory: Path, role: str) -> None:
    global _file
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _file = (directory / f"{role.replace(' ', '_')}.{os.getpid()}.txt").open("w")
    except OSError:  # another node without this directory: Ray keeps what its processes write
        _file = os.fdopen(os.dup(2), "w")
    faulthandler.register(signal.SIGUSR1, file=_file, all_threads=True, chain=False)


def _send(beacon: Beacon, role: str) -> None:
    hello = {"key": beacon.key, "role": role, "pid": os.getpid(), "host": socket.gethostname()}
    try:
        connection = socket.create_connection((beacon.host, beacon.port), timeout=_CONNECT_S)
    except OSError as error:
        address = f"{beacon.host}:{beacon.port}"
        logger.warning("%s is not watched: the driver's port %s cannot be reached (%s)", role, address, error)
        return
    try:
        with connection:
            connection.sendall(json.dumps(hello).encode() + b"\n")
            while True:
                time.sleep(beacon.interval_s)
                connection.sendall(b"\n")
    except OSError:
        return  # the driver has ended
