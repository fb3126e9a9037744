"""Calls into vLLM's engine and HTTP server whose names or arguments differ between its releases."""

from __future__ import annotations

import inspect
from collections.abc import Callable


async def drain(engine) -> None:
    """Have an `AsyncLLM` finish what is in flight and hold what comes, until its `resume_generation`.

    `pause_generation(mode="wait")` does this and then sleeps for 20 ms, in which answers reach whoever asked for them.
    An update has no need of that: the answers are tokens already.
    """
    core = getattr(engine, "engine_core", None)
    if hasattr(core, "pause_scheduler_async"):
        await core.pause_scheduler_async(mode="wait", clear_cache=False)
    else:
        await engine.pause_generation(mode="wait", clear_cache=False)


def openai_functions() -> tuple[Callable, Callable, Callable]:
    """vLLM's `build_app`, `init_app_state` and `make_arg_parser` of its OpenAI-compatible endpoint."""
    try:
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # before 0.31
        from vllm.entrypoints.openai.api_server import build_app, init_app_state
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    return build_app, init_app_state, make_arg_parser


def build_openai_app(model: str, tasks: tuple[str, ...], model_config, *, api_key: str):
    """The FastAPI application and the arguments it was built from; no engine is behind it yet."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    build_app, _, make_arg_parser = openai_functions()
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", model, "--disable-uvicorn-access-log"])
    arguments.api_key = [api_key]
    # vLLM 0.18 does not ask for the model's config.
    takes_config = "model_config" in inspect.signature(build_app).parameters
    return build_app(arguments, tasks, *([model_config] if takes_config else [])), arguments


async def openai_app(engine, model: str, *, api_key: str):
    """vLLM's FastAPI application in front of `engine`; requests to `/v1` need `Authorization: Bearer <api_key>`."""
    tasks = await engine.get_supported_tasks()
    app, arguments = build_openai_app(model, tasks, engine.model_config, api_key=api_key)
    _, init_app_state, _ = openai_functions()
    await init_app_state(engine, app.state, arguments, tasks)
    return app
