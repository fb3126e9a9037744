"""The address of the reward model: an HTTP server on this host that passes each request to an engine.

Reward functions get the address as `reward_router_address`. Requests travel to the engines through Ray, so the engines
open no port, and may run on other nodes. The server accepts connections of this host only, and needs no key.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from typing import TYPE_CHECKING

from verl.timeline.spans import spanned
from verl.workers.rollout.replica import ReplicaSet, vLLMReplica
from verl.workers.rollout.types import ReplicaUnavailable

if TYPE_CHECKING:
    from aiohttp import web

logger = logging.getLogger(__name__)

_HOST = "127.0.0.1"
_BACKLOG = 4096
_OPEN_FILES = 65536
_SHUTDOWN_S = 1.0
_LARGEST_REQUEST = 2**30
# Headers of one connection, and those that describe a body in another form than the one that is passed on.
_NOT_PASSED = {"host", "connection", "content-length", "transfer-encoding", "accept-encoding", "expect", "upgrade"}


class RewardRouter:
    """Passes requests to the least busy engine; restarts dead engines.

    The address exists from the construction on; requests before `start` wait.

    Args:
        model: name of the model for messages.
    """

    def __init__(self, model: str = "reward model"):
        self._model = model
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.bind((_HOST, 0))
        self._socket.listen(_BACKLOG)
        self._engines: ReplicaSet | None = None
        self._runner: web.AppRunner | None = None
        self._restart: asyncio.Task[int] | None = None

    @property
    def address(self) -> str:
        """Host and port, for example `127.0.0.1:34567`."""
        return f"{_HOST}:{self._socket.getsockname()[1]}"

    async def start(self, engines: ReplicaSet) -> None:
        """Serve requests with these running engines."""
        from aiohttp import web

        self._engines = engines
        _raise_limit_of_open_files()
        app = web.Application(client_max_size=_LARGEST_REQUEST)
        app.router.add_route("*", "/{path:.*}", self._respond)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=_SHUTDOWN_S)
        await self._runner.setup()
        await web.SockSite(self._runner, self._socket, backlog=_BACKLOG).start()

    async def stop(self) -> None:
        """End the server."""
        if self._restart is not None:
            self._restart.cancel()
        if self._runner is not None:
            await self._runner.cleanup()
        self._socket.close()

    @spanned("reward model request", "request", overlaps=True)
    async def _respond(self, request: web.Request) -> web.Response:
        from aiohttp import web

        headers = {name: value for name, value in request.headers.items() if name.lower() not in _NOT_PASSED}
        body, refused, reason = await request.read(), set[int](), "no engine runs"
        while (engine := await self._choose(refused)) is not None:
            try:
                status, kind, content = await engine.http_request(request.method, request.path_qs, headers, body)
            except ReplicaUnavailable as error:
                logger.warning("%s: %s", self._model, error)
                refused.add(engine.rank)
                reason = str(error)
                continue
            return web.Response(status=status, body=content, headers={"Content-Type": kind} if kind else None)
        message = f"no engine of the {self._model} responds: {reason}"
        return web.json_response({"error": {"message": message}}, status=503)

    async def _choose(self, refused: set[int]) -> vLLMReplica | None:
        """Return the least busy engine, and start a restart of dead ones; None if none is left to ask."""
        assert self._engines is not None, "set by `start`"
        if len(self._engines.alive) < len(self._engines.replicas) and (self._restart is None or self._restart.done()):
            self._restart = asyncio.create_task(self._engines.restart_dead())
            self._restart.add_done_callback(self._log_failure)
        if not self._engines.alive and self._restart is not None and not refused:
            await asyncio.wait([self._restart])
        candidates = [engine for engine in self._engines.alive if engine.rank not in refused]
        return min(candidates, key=lambda engine: engine.in_flight, default=None)

    def _log_failure(self, restart: asyncio.Task[int]) -> None:
        if not restart.cancelled() and (error := restart.exception()) is not None:
            logger.error("%s: an engine did not restart: %s", self._model, error)


def _raise_limit_of_open_files() -> None:
    """Allow one open file for each connection: each reward worker may have hundreds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
