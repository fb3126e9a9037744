"""Calls of vLLM's engine and OpenAI-compatible server that differ between its releases."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any


async def drain(engine: Any) -> None:
    """Let an `AsyncLLM` finish the requests in flight and hold new ones until its `resume_generation`.

    `pause_generation(mode="wait")` does this and then sleeps for 20 ms, so that the responses reach their clients. An
    update does not need that: the responses are tokens already.
    """
    core: Any = getattr(engine, "engine_core", None)
    if hasattr(core, "pause_scheduler_async"):
        await core.pause_scheduler_async(mode="wait", clear_cache=False)
    else:
        await engine.pause_generation(mode="wait", clear_cache=False)


def openai_functions() -> tuple[Callable, Callable, Callable]:
    """Return vLLM's `build_app`, `init_app_state` and `make_arg_parser` of its OpenAI-compatible server."""
    try:
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # modules of vLLM before 0.31, which the installed release does not have
        from vllm.entrypoints.openai.api_server import build_app, init_app_state
        from vllm.entrypoints.openai.cli_args import make_arg_parser  # type: ignore[import-not-found, no-redef]
    return build_app, init_app_state, make_arg_parser


def build_openai_app(model: str, tasks: tuple[str, ...], model_config: Any, *, api_key: str | None) -> tuple[Any, Any]:
    """Return the FastAPI application and the arguments that it was built from. It has no engine yet.

    It has none of vLLM's development routes, whatever VLLM_SERVER_DEV_MODE is.
    """
    from vllm import envs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # Development routes (/collective_rpc, /sleep, ...) would run any function, without the key. vllm-ascend sets the
    # variable with `rl_config`. A module attribute precedes the variable and vLLM's cache of it.
    vars(envs)["VLLM_SERVER_DEV_MODE"] = False
    build_app, _, make_arg_parser = openai_functions()
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", model, "--disable-uvicorn-access-log"])
    arguments.api_key = None if api_key is None else [api_key]
    # vLLM 0.18 does not take the model's config.
    takes_config = "model_config" in inspect.signature(build_app).parameters
    return build_app(arguments, tasks, *([model_config] if takes_config else [])), arguments


def metrics_app() -> Any:
    """Return an ASGI application that serves the metrics of the engine in this process, at every path."""
    from prometheus_client import make_asgi_app
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    return make_asgi_app(registry=get_prometheus_registry())


async def openai_app(engine: Any, model: str, *, api_key: str | None) -> Any:
    """Return vLLM's FastAPI application for `engine`.

    Args:
        api_key: requests to `/v1` need `Authorization: Bearer <api_key>`; None for no such check.
    """
    tasks = await engine.get_supported_tasks()
    app, arguments = build_openai_app(model, tasks, engine.model_config, api_key=api_key)
    _, init_app_state, _ = openai_functions()
    await init_app_state(engine, app.state, arguments, tasks)
    return app


async def call_app(app: Any, method: str, path: str, headers: Mapping[str, str], body: bytes) -> tuple[int, str, bytes]:
    """Send one HTTP request to an ASGI application in this process, without a network.

    Returns:
        Status, content type and body of the response; status 500 if the application raises.
    """
    import httpx

    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=None) as client:
        response = await client.request(method, path, headers=dict(headers), content=body)
    return response.status_code, response.headers.get("content-type", ""), response.content
