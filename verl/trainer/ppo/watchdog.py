"""The watchdog of a run: notices stuck processes, writes the stacks of all processes, and names the stuck one.

Every process connects to it and sends a sign of life every few seconds (`verl.utils.heartbeat`). A process that ends
closes its connection; others notice its death by themselves. A process that is silent for longer than the limit of its
kind is stuck:

    kind of process                  consequence
    -------------------------------  ------------------------------------------------------------------------------
    engine of a replica              killed and started again (`ReplicaRecovery`)
    engine of a teacher, reward      killed and started again by its user
    model
    trainer rank                     killed; the run ends with `WatchdogError`
    reward worker that is stopped    killed; the pool starts another one
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from verl.config import PPOConfig
from verl.config.watchdog import WatchdogConfig
from verl.single_controller.kill import kill_family
from verl.single_controller.placement import on_node
from verl.utils.asyncio_utils import cancel_and_wait
from verl.utils.heartbeat import Beacon, set_beacon
from verl.workers.weight_sync.transports.nodes import is_multi_node

logger = logging.getLogger(__name__)

# Time for the processes to write their stacks after the signal.
_STACKS_S = 2.0
_PY_SPY_S = 20.0
_STOPPED = "stopped by a signal (SIGSTOP)"


class WatchdogError(RuntimeError):
    """A process of the run is stuck, and the run cannot go on without it."""


@dataclass(eq=False)
class Peer:
    """A process that sends signs of life.

    Attributes:
        role: its name for messages, such as `trainer rank 0`.
        host: name of its host.
        heard: time of the last sign of life, by `time.monotonic`.
    """

    role: str
    pid: int
    host: str
    heard: float = field(default_factory=time.monotonic)

    @property
    def is_local(self) -> bool:
        return self.host == socket.gethostname()

    def __str__(self) -> str:
        return f"{self.role} (pid {self.pid} on {self.host})"

    def state(self) -> str:
        """Return the state of a process of this host in words; empty if it is not known."""
        if not self.is_local:
            return ""
        with contextlib.suppress(OSError, IndexError):
            letter = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
            return {"T": _STOPPED, "t": "stopped by a debugger", "D": "waiting for a device or a disk"}.get(letter, "")
        return ""


class Watchdog:
    """Receives the signs of life; made by `watching`.

    Args:
        config: limits.
        directory: for the files with stacks.

    Attributes:
        kill_replica: kills a replica, given its rank and the reason, which starts it again; None before there is any.
    """

    def __init__(self, config: WatchdogConfig, directory: Path):
        self._config, self._directory = config, directory
        self._key = secrets.token_hex(16)
        self._peers: set[Peer] = set()
        self._connections: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed = asyncio.Event()
        self._error: WatchdogError | None = None
        self._server: asyncio.Server | None = None
        self.kill_replica: Callable[[int, str], Awaitable[None]] | None = None

    async def failure(self) -> None:
        """Wait until the run cannot go on because a process is stuck.

        Raises:
            WatchdogError: names it.
        """
        await self._failed.wait()
        assert self._error is not None
        raise self._error

    def on_overdue(self, call: str) -> None:
        """End the run because a call takes longer than `phase_timeout_s`; `call` names it and the processes."""
        self._start(self._end_run(f"{call} (trainer.watchdog.phase_timeout_s={self._config.phase_timeout_s:g})"))

    async def open(self) -> None:
        """Listen, and make the processes that this one starts from now on send signs of life."""
        host = str(ray.util.get_node_ip_address()) if is_multi_node() else "127.0.0.1"
        self._server = await asyncio.start_server(self._receive, host, 0)
        port = self._server.sockets[0].getsockname()[1]
        set_beacon(Beacon(host, port, self._key, self._config.heartbeat_s, str(self._directory)))
        self._start(self._watch())

    async def close(self) -> None:
        """Stop to listen, and delete empty files of stacks."""
        set_beacon(None)
        if self._server is not None:
            self._server.close()
        for writer in self._connections:
            writer.close()
        await asyncio.gather(*self._connections.values(), return_exceptions=True)
        await cancel_and_wait(self._tasks)
        if self._directory.is_dir():
            for file in self._directory.glob("*.txt"):
                if not file.stat().st_size:
                    file.unlink()
            with contextlib.suppress(OSError):  # it is not empty
                self._directory.rmdir()

    # ---- noticing ----

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer, task = None, asyncio.current_task()
        assert task is not None
        self._connections[writer] = task
        try:
            hello = json.loads(await reader.readline())
            if not secrets.compare_digest(hello.pop("key"), self._key):
                return
            peer = Peer(**hello)
            self._peers.add(peer)
            while await reader.read(1 << 10):
                peer.heard = time.monotonic()
        except (OSError, ValueError, KeyError, TypeError):
            return  # it died, or is none of this run's processes
        finally:
            if peer is not None:
                self._peers.discard(peer)
            self._connections.pop(writer)
            writer.close()

    async def _watch(self) -> None:
        interval = self._config.heartbeat_s
        slack = min(self._limit(kind)[1] for kind in ("replica", "trainer rank", "reward worker")) / 2
        last = time.monotonic()
        while True:
            await asyncio.sleep(interval)
            now = time.monotonic()
            if now - last > interval + slack:
                # This process itself was busy or stopped: the signs of life have not been read yet.
                for peer in self._peers:
                    peer.heard = now
            last = now
            for peer in tuple(self._peers):
                key, limit = self._limit(peer.role)
                if now - peer.heard > limit:
                    self._peers.discard(peer)
                    self._start(self._on_silence(peer, f"trainer.watchdog.{key}={limit:g}"))

    def _limit(self, role: str) -> tuple[str, float]:
        if role.startswith("trainer rank"):
            return "trainer_timeout_s", self._config.trainer_timeout_s
        if role.startswith("reward worker"):
            return "reward_timeout_s", self._config.reward_timeout_s
        return "engine_timeout_s", self._config.engine_timeout_s

    async def _on_silence(self, peer: Peer, limit: str) -> None:
        state = peer.state()
        reason = f"{peer} is stuck: it sends no sign of life ({limit})" + (f"; it is {state}" if state else "")
        if peer.role.startswith("reward worker"):
            # A scorer may keep Python's lock for long; reward.timeout limits it.
            if state == _STOPPED:
                logger.warning("%s. It is replaced", reason)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(peer.pid, signal.SIGKILL)
            return
        replica = re.match(r"replica (\d+)", peer.role)
        if peer.role.startswith("trainer rank") or (replica and self.kill_replica is None):
            await self._end_run(reason, peer)
            return
        await self.write_stacks(peer)
        reason = f"{reason}. Stacks of all processes: {self._directory}"
        if replica and self.kill_replica is not None:
            await self.kill_replica(int(replica[1]), reason)
        else:
            logger.warning("%s. It is killed", reason)
            await self._kill(peer)

    async def _kill(self, peer: Peer) -> None:
        """End a process at once; Ray only asks it to end."""
        await kill_family(_nodes().get(peer.host, ray.get_runtime_context().get_node_id()), peer.pid)

    async def _end_run(self, reason: str, peer: Peer | None = None) -> None:
        await self.write_stacks(peer)
        if peer is not None:
            await self._kill(peer)
        self._error = WatchdogError(f"{reason}. Stacks of all processes: {self._directory}")
        self._failed.set()

    # ---- stacks ----

    async def write_stacks(self, stuck: Peer | None = None) -> None:
        """Write the Python stacks of all processes to files in the directory.

        Args:
            stuck: a process that may not be able to write its own; py-spy does if it is installed.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        with (self._directory / f"driver.{os.getpid()}.txt").open("a") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        pids: defaultdict[str, list[int]] = defaultdict(list)
        for peer in self._peers if stuck is None else {*self._peers, stuck}:
            pids[peer.host].append(peer.pid)
        nodes = _nodes()
        for host, on_host in pids.items():
            if host == socket.gethostname():
                _ask_for_stacks(on_host)
            elif host in nodes:
                ray.remote(_ask_for_stacks).options(**on_node(nodes[host])).remote(on_host)
        if stuck is not None and stuck.is_local:
            await asyncio.to_thread(self._py_spy, stuck)
        await asyncio.sleep(_STACKS_S)

    def _py_spy(self, peer: Peer) -> None:
        program = shutil.which("py-spy") or shutil.which("py-spy", path=os.path.dirname(sys.executable))
        if program is None:
            return
        command = [program, "dump", "--nonblocking", "--pid", str(peer.pid)]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            result = subprocess.run(command, capture_output=True, text=True, timeout=_PY_SPY_S, check=False)
            name = f"{peer.role.replace(' ', '_')}.{peer.pid}.py-spy.txt"
            (self._directory / name).write_text(result.stdout + result.stderr)

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _nodes() -> dict[str, str]:
    """Return Ray's id of each host."""
    return {node["NodeManagerHostname"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _ask_for_stacks(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)


@asynccontextmanager
async def watching(config: PPOConfig) -> AsyncIterator[Watchdog]:
    """Watch the processes that are started in the block, unless `trainer.watchdog.enable` is False."""
    watchdog = Watchdog(config.trainer.watchdog, Path(config.trainer.default_local_dir) / "stacks")
    if config.trainer.watchdog.enable:
        await watchdog.open()
    try:
        yield watchdog
    finally:
        await watchdog.close()
