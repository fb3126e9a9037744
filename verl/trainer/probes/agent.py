"""Probe of agent loops and tools: constructed as at the start of a run. No loop runs, and no tool is called."""

from __future__ import annotations

import inspect
from typing import Any

from verl.agent_loop.agent_loop import AgentLoopBase, agent_loop_names, get_agent_loop
from verl.agent_loop.loops_file import AgentLoopFileError, register_from_file
from verl.config import names
from verl.config.agent_loops_file import AGENT_LOOPS_KEY
from verl.tools.utils.tool_registry import ToolConfigError, all_tools
from verl.trainer.probes.context import Context
from verl.workers.rollout.client import LLMServerClient
from verl.workers.rollout.replica import ReplicaSet

_MULTI_TURN = "actor_rollout_ref.rollout.multi_turn"


def probe(context: Context) -> None:
    """Construct the tools, then every agent loop of the user."""
    _probe_tools(context)
    agent = context.config.actor_rollout_ref.rollout.agent
    if agent.agent_loop_config_path is not None:
        context.step(f"{AGENT_LOOPS_KEY}={agent.agent_loop_config_path}: the import")
        try:
            register_from_file(agent.agent_loop_config_path)
        except AgentLoopFileError as error:
            context.failed(error)
            return
    named = {name for sample in context.samples if (name := sample.row.get("agent_name"))}
    chosen = {agent.default_agent_loop, *named}
    known = agent_loop_names()
    for name in sorted(chosen - set(known)):
        context.error(
            f"the column agent_name of the data has {name!r}, which is no agent loop; use one of {', '.join(known)}"
        )
    # The tools are constructed, so the built-in loops need no check.
    loops = [name for name in known if name not in names.AGENT_LOOPS]
    if not loops:
        return
    tokenizer = context.tokenizer("your agent loops")
    if tokenizer is None:
        return
    for name in loops:
        _probe_loop(context, name, tokenizer)


def _probe_tools(context: Context) -> None:
    multi_turn = context.config.actor_rollout_ref.rollout.multi_turn
    context.step(f"{_MULTI_TURN}.tool_config_path, {_MULTI_TURN}.function_tool_path: constructing the tools")
    try:
        all_tools(multi_turn.tool_config_path, multi_turn.function_tool_path)
    except ToolConfigError as error:
        context.failed(error)


def _probe_loop(context: Context, name: str, tokenizer: Any) -> None:
    """Construct a loop as `SampleGenerator` does, and check that `run` takes the arguments of a run."""
    registered = get_agent_loop(name)
    loop = registered.loop
    label = f"agent loop {name} ({loop.__qualname__} in {inspect.getfile(loop)})"
    shared: dict[str, Any] | None = None
    with context.reported(f"{label}: setup"):
        shared = registered.shared_arguments(tokenizer, context.config)
    if shared is None:
        return
    with context.reported(f"{label}: its constructor"):
        made = loop(LLMServerClient(ReplicaSet([])), tokenizer, context.config, **shared)
        _check_run(context, made, label)


def _check_run(context: Context, loop: AgentLoopBase, label: str) -> None:
    if not inspect.iscoroutinefunction(loop.run):
        context.warn(f"{label}: run is not a coroutine function, and a run awaits its result; write async def run")
    for sample in context.samples:
        row = {**sample.row, "prompt_token_ids": [], "uid": ""}
        try:
            inspect.signature(loop.run).bind({}, **row)
        except TypeError as error:
            context.error(
                f"{label}: run cannot be called with {sample.name} ({error}); every column is a keyword, so write "
                "async def run(self, sampling_params, **row)"
            )
            return
