"""The class that tools derive from."""

from __future__ import annotations

import uuid
from typing import Any

from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse


class BaseTool:
    """A tool, made once a run from the tool config file.

    For each sample that calls it, it makes one instance: `create` before the first call, `execute` for every call,
    `calc_reward` and `release` at the end of the sample. Many instances are open at the same time; what belongs to one
    of them is kept under its id. Every method may be `async def` or a plain `def`; a plain one runs in a thread of its
    own.

    Args:
        config: the tool's `config` in the file. `timeout` (seconds, 30 if absent) limits each call.
        tool_schema: the tool's `tool_schema` in the file, None where it has none.

    Raises:
        ValueError: neither the file nor `get_openai_tool_schema` gives a schema.
    """

    tool_schema: OpenAIFunctionToolSchema | None = None

    def __init__(self, config: dict[str, Any], tool_schema: OpenAIFunctionToolSchema | None):
        self.config = config
        schema = tool_schema or self.get_openai_tool_schema()
        if schema is None:
            raise ValueError(
                f"{type(self).__name__} has no schema: give tool_schema in the tool config file, or return one from "
                "get_openai_tool_schema"
            )
        self.tool_schema = schema
        self.name = schema.function.name

    def get_openai_tool_schema(self) -> OpenAIFunctionToolSchema | None:
        """The schema where the config file gives none."""
        return self.tool_schema

    async def create(self, instance_id: str | None = None, **kwargs: Any) -> tuple[str, ToolResponse]:
        """Open an instance for one sample.

        Args:
            kwargs: `create_kwargs`: the sample's `extra_info.tools_kwargs.<name>.create_kwargs`, {} where there are
                none.

        Returns:
            The instance's id; and a response, which nobody is shown.
        """
        return instance_id or str(uuid.uuid4()), ToolResponse()

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        """One call.

        Args:
            instance_id: what `create` gave.
            parameters: the model's arguments. Their names fit the schema; their types are as the model wrote them.
            kwargs: `agent_data` (`verl.agent_loop.tool_agent_loop.AgentData`, the sample so far), and the sample's
                `extra_info.tools_kwargs.<name>.execute_kwargs`.

        Returns:
            What the model is shown; a reward of this step or None; numbers of the tool's own, which are not logged.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define execute")

    async def calc_reward(self, instance_id: str, **kwargs: Any) -> float | None:
        """The reward of the whole instance, asked for once at the end of the sample; None for none."""
        return None

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        """Close an instance; also after calls that failed."""
