"""The tool calls of one sample: instances, isolated calls, failures and release."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from verl.agent_loop.agent_data import AgentData
from verl.agent_loop.tool_parser import ToolCall
from verl.tools.base_tool import BaseTool
from verl.tools.schemas import ToolResponse
from verl.tools.utils.isolation import CallFailed, CallTimeout, IsolatedCalls
from verl.tools.utils.tool_registry import tool_timeout

logger = logging.getLogger(__name__)


class CallError(Exception):
    """A failed call: `kind` is for the metric, the message for the model."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Toolbox:
    """All tools of a run.

    Attributes:
        tools: tools by name.
        max_response_length: maximum number of characters of a tool response.
        truncate_side: `left`, `right` or `middle`, see `truncate`.
        calls: runs the calls in other threads.
        reported: (tool, kind) of the failures that were already logged as warnings.
    """

    tools: Mapping[str, BaseTool]
    max_response_length: int
    truncate_side: str
    calls: IsolatedCalls = field(default_factory=IsolatedCalls)
    reported: set[tuple[str, str]] = field(default_factory=set)

    def schemas(self) -> list[dict[str, Any]]:
        """Return the schemas for the chat template."""
        return [tool.tool_schema.model_dump(exclude_unset=True, exclude_none=True) for tool in self.tools.values()]

    def select(self, names: Sequence[str] | None) -> Toolbox:
        """Return a toolbox with the named tools; with all tools if `names` is None or empty.

        Raises:
            ValueError: unknown tool.
        """
        if not names:
            return self
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise ValueError(f"extra_info.tool_selection={names!r}: must be a list of names of tools")
        unknown = sorted(set(names) - set(self.tools))
        if unknown:
            raise ValueError(
                f"extra_info.tool_selection: unknown tool {', '.join(unknown)}; the tools are "
                f"{', '.join(self.tools) or 'none'}"
            )
        chosen = {name: tool for name, tool in self.tools.items() if name in names}
        return replace(self, tools=chosen)


def truncate(text: str, length: int, side: str) -> str:
    """Return at most `length` characters of `text`, with a mark at the removed part.

    Args:
        text: the text.
        length: in characters, without the mark.
        side: the side that is removed, as in `data.truncation` and in upstream verl: `left` keeps the end, `right` the
            beginning, `middle` half of each.
    """
    if len(text) <= length:
        return text
    if side == "left":
        return "(truncated)..." + text[-length:]
    if side == "right":
        return text[:length] + "...(truncated)"
    return text[: length - length // 2] + "...(truncated)..." + text[len(text) - length // 2 :]


class ToolSession:
    """The tool instances and calls of one sample.

    Args:
        toolbox: the tools that the sample may call.
        tools_kwargs: by tool: `create_kwargs` and `execute_kwargs`.
        agent_data: passed to every call.

    Attributes:
        rewards: rewards of the calls that returned one, in order.
        calls: number of calls.
        failures: number of failures by kind.
        seconds: time spent waiting for tools.
    """

    def __init__(self, toolbox: Toolbox, tools_kwargs: Mapping[str, Any], agent_data: AgentData):
        self._toolbox = toolbox
        self._kwargs = tools_kwargs
        self._agent_data = agent_data
        self._instances: dict[str, str] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self.rewards: list[float] = []
        self.calls = 0
        self.failures: Counter[str] = Counter()
        self.seconds = 0.0

    async def run(self, calls: Sequence[ToolCall]) -> list[str]:
        """Run the calls at the same time and return the text for the model, one per call."""
        started = asyncio.get_running_loop().time()
        outcomes = await asyncio.gather(*(self._run_call(call) for call in calls))
        self.seconds += asyncio.get_running_loop().time() - started
        self.calls += len(calls)
        self.rewards += [reward for _, reward in outcomes if reward is not None]
        length, side = self._toolbox.max_response_length, self._toolbox.truncate_side
        return [truncate(text, length, side) for text, _ in outcomes]

    def count_dropped(self, count: int) -> None:
        """Count calls that are not run as failures."""
        if count:
            self.failures["dropped"] += count

    async def instance_rewards(self) -> dict[str, float]:
        """Return `calc_reward` of every tool that was used and returns a reward."""
        rewards: dict[str, float] = {}
        for name, instance in self._instances.items():
            tool = self._toolbox.tools[name]
            try:
                reward = _number(await self._isolated(tool, tool.calc_reward, [instance]), name)
            except CallError as error:
                self._record_failure(name, error)
                continue
            if reward is not None:
                rewards[name] = reward
        return rewards

    async def close(self) -> None:
        """Release every instance; log and count failed releases."""
        instances, self._instances = self._instances, {}
        for name, instance in instances.items():
            tool = self._toolbox.tools[name]
            try:
                await self._isolated(tool, tool.release, [instance])
            except CallError as error:
                self._record_failure(name, CallError("release", str(error)))

    async def _run_call(self, call: ToolCall) -> tuple[str, float | None]:
        try:
            return await self._execute(call)
        except CallError as error:
            self._record_failure(call.name, error)
            return f"Error: {error}", None

    async def _execute(self, call: ToolCall) -> tuple[str, float | None]:
        if call.problem is not None:
            raise CallError("malformed", f'the tool call {call.problem}; write {{"name": ..., "arguments": {{...}}}}')
        tool = self._toolbox.tools.get(call.name)
        if tool is None:
            known = ", ".join(self._toolbox.tools) or "none"
            raise CallError("unknown_tool", f"there is no tool {call.name!r}; the tools are: {known}")
        _check_arguments(tool, call.arguments)
        kwargs = self._kwargs.get(call.name) or {}
        instance = await self._instance(tool, kwargs.get("create_kwargs") or {})
        extra = {**(kwargs.get("execute_kwargs") or {}), "agent_data": self._agent_data}
        result = await self._isolated(tool, tool.execute, [instance, call.arguments], extra)
        return _read_result(result, call.name)

    async def _instance(self, tool: BaseTool, create_kwargs: Mapping[str, Any]) -> str:
        # Calls of one turn run at the same time, so two of them may both need a new instance.
        async with self._locks.setdefault(tool.name, asyncio.Lock()):
            if tool.name not in self._instances:
                created = await self._isolated(tool, tool.create, [], {"create_kwargs": dict(create_kwargs)})
                if created == ():
                    raise CallError("raised", f"{tool.name}.create returned an empty tuple, not (id, ToolResponse)")
                self._instances[tool.name] = created[0] if isinstance(created, tuple) else created
            return self._instances[tool.name]

    async def _isolated(
        self, tool: BaseTool, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        timeout = tool_timeout(tool)
        try:
            return await self._toolbox.calls.call(function, args, kwargs or {}, timeout=timeout)
        except CallTimeout:
            raise CallError("timed_out", f"{tool.name} did not answer within {timeout:g} seconds") from None
        except CallFailed as error:
            raise CallError("raised", f"{tool.name} failed: {error}") from None

    def _record_failure(self, name: str, error: CallError) -> None:
        self.failures[error.kind] += 1
        # Warn once per kind; a model that learns to call tools fails thousands of times, which the metrics count.
        level = logging.DEBUG if (name, error.kind) in self._toolbox.reported else logging.WARNING
        if name in self._toolbox.tools or not name:
            self._toolbox.reported.add((name, error.kind))
            logger.log(level, "tool call: %s (further failures of this kind only in agent_loop/tool_failures)", error)


def _check_arguments(tool: BaseTool, arguments: Mapping[str, Any]) -> None:
    parameters = tool.tool_schema.function.parameters
    known = ", ".join(parameters.properties) or "none"
    missing = [name for name in parameters.required if name not in arguments]
    if missing:
        raise CallError("wrong_arguments", f"{tool.name} needs {', '.join(missing)}; its arguments are: {known}")
    open_ended = (parameters.model_extra or {}).get("additionalProperties", False) is not False
    unknown = [name for name in arguments if name not in parameters.properties]
    if unknown and not open_ended:
        raise CallError(
            "wrong_arguments",
            f"{tool.name} has no argument {', '.join(map(repr, unknown))}; its arguments are: {known}",
        )


def _read_result(result: Any, name: str) -> tuple[str, float | None]:
    if not isinstance(result, tuple) or len(result) != 3 or not isinstance(result[0], ToolResponse):
        raise CallError(
            "raised", f"{name} returned a {type(result).__name__}, not (ToolResponse, reward, metrics): fix the tool"
        )
    response, reward, _ = result
    if response.image or response.video:
        raise CallError("raised", f"{name} returned images or video, which are not supported yet: return text")
    if not isinstance(response.text, str | None):
        raise CallError("raised", f"{name} returned a {type(response.text).__name__} as text: fix the tool")
    return response.text or "", _number(reward, name)


def _number(value: Any, name: str) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except Exception:  # noqa: BLE001  (an object of the user may raise anything)
        raise CallError("raised", f"{name} gave a {type(value).__name__} as its reward, not a finite number") from None
    if not math.isfinite(number):
        raise CallError("raised", f"{name} gave the reward {number}, which is not a finite number")
    return number
