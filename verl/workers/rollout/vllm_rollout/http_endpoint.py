"""vLLM's own OpenAI-compatible HTTP endpoint in front of a replica's engine."""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
from collections.abc import Callable
from typing import Any

from verl.config import ServerConfig


def bind(host: str, port: int) -> socket.socket:
    """Return a bound socket; port 0 selects a free one.

    Raises:
        OSError: the port is in use or not permitted; names the config key.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(
            error.errno,
            f"actor_rollout_ref.rollout.server.port={port} on {host}: {error.strerror}; "
            "choose another port, or 0 for a free one",
        ) from error
    return listener


# Paths that reveal neither weights nor requests and change nothing.
HARMLESS = frozenset({"/health", "/ping", "/version", "/metrics", "/load"})


class Guard:
    """ASGI middleware in front of vLLM's application.

    Every path except those in `HARMLESS` needs `Authorization: Bearer KEY`, else it gets status 401: vLLM itself checks
    only some prefixes, and others generate too (`/invocations`, `/generative_scoring`). POST requests get status 503
    while `refusal` returns a reason. Connections other than HTTP are closed.
    """

    def __init__(self, app: Any, key: str, refusal: Callable[[], str | None]):
        self._app, self._authorization, self._refusal = app, f"Bearer {key}".encode(), refusal

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await send({"type": f"{scope['type']}.close", "code": 1008})
        elif scope["path"] in HARMLESS:
            await self._app(scope, receive, send)
        elif not self._permits(scope):
            await _error(send, 401, "the key of this replica is missing: send Authorization: Bearer KEY")
        elif scope["method"] == "POST" and (reason := self._refusal()) is not None:
            await _error(send, 503, f"the replica serves nothing: {reason}")
        else:
            await self._app(scope, receive, send)

    def _permits(self, scope: dict[str, Any]) -> bool:
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        return len(given) == 1 and secrets.compare_digest(given[0], self._authorization)


async def _error(send: Any, status: int, message: str) -> None:
    body = json.dumps({"error": {"message": message}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class HttpEndpoint:
    """Serves an engine over HTTP on the actor's event loop.

    Args:
        config: `actor_rollout_ref.rollout.server`; without `api_key` a random key is generated.
        replica_rank: added to a fixed port, so that replicas on one host do not collide.
        refusal: returns the reason why requests are refused now, or None.
    """

    def __init__(self, config: ServerConfig, replica_rank: int, *, refusal: Callable[[], str | None]):
        self._config = config
        self._refusal = refusal
        self._socket = bind(config.host, config.port + replica_rank if config.port else 0)
        self.api_key = config.api_key or secrets.token_urlsafe(24)
        self._task: asyncio.Task[None] | None = None

    async def start(self, engine: Any, engine_arguments: Any) -> str:
        """Start serving; without `enable_http` the metrics alone.

        Returns:
            The base address, for example `http://127.0.0.1:34567`.
        """
        import uvicorn

        from verl.utils.vllm.server import metrics_app, openai_app

        if self._config.enable_http:
            api = await openai_app(engine, engine_arguments.model, api_key=self.api_key)
            app: Any = Guard(api, self.api_key, self._refusal)
        else:
            app = metrics_app()
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        # The actor handles the process's signals.
        # Older uvicorn calls this method; newer ones have none.
        vars(self._server)["install_signal_handlers"] = lambda: None
        # A request before the first turn of the server waits instead of being refused.
        self._socket.listen()
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        host, port = self._socket.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def stop(self) -> None:
        """Stop serving and free the port."""
        if self._task is not None:
            self._server.should_exit = True
            await asyncio.wait([self._task], timeout=5)
        self._socket.close()
