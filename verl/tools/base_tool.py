"""The base class of tools."""

from __future__ import annotations

import uuid
from typing import Any

from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse


class BaseTool:
    """A tool, constructed once per run from the tool config file.

    Each sample that calls the tool has one instance: `create` runs before the first call, `execute` for every call,
    `calc_reward` and `release` at the end of the sample. Many instances are open at the same time; store the state of
    an instance under its id. Every method may be `async def` or a plain `def`; a plain method runs in its own thread.

    Args:
        config: the tool's `config` in the file. `timeout` (seconds, 30 if absent) limits each call.
        tool_schema: the tool's `tool_schema` in the file, None if it has none.

    Raises:
        ValueError: neither the file nor `get_openai_tool_schema` defines a schema.
    """

    # A subclass may set it on the class; after __init__ it is never None.
    tool_schema: OpenAIFunctionToolSchema = None  # type: ignore[assignment]

    def __init__(self, config: dict[str, Any], tool_schema: OpenAIFunctionToolSchema | None):
        self.config = config
        schema = tool_schema or self.get_openai_tool_schema()
        if schema is None:
            raise ValueError(
                f"{type(self).__name__} has no schema: set tool_schema in the tool config file, or return one from "
                "get_openai_tool_schema"
            )
        self.tool_schema = schema
        self.name = schema.function.name

    def get_openai_tool_schema(self) -> OpenAIFunctionToolSchema | None:
        """Return the schema to use if the config file defines none."""
        return self.tool_schema

    async def create(self, instance_id: str | None = None, **kwargs: Any) -> tuple[str, ToolResponse]:
        """Open an instance for one sample.

        Args:
            instance_id: id of the instance; None to generate one.
            kwargs: `create_kwargs`: the sample's `extra_info.tools_kwargs.<name>.create_kwargs`, {} if it has none.

        Returns:
            The instance's id; and a response, which is not shown to the model.
        """
        return instance_id or str(uuid.uuid4()), ToolResponse()

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        """Run one call.

        Args:
            instance_id: the id that `create` returned.
            parameters: the model's arguments. Their names match the schema; their types are not checked.
            kwargs: `agent_data` (`verl.agent_loop.AgentData`, the sample so far), and the sample's
                `extra_info.tools_kwargs.<name>.execute_kwargs`.

        Returns:
            The response for the model; the reward of this call or None; metrics of the tool, which are not logged.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define execute")

    async def calc_reward(self, instance_id: str, **kwargs: Any) -> float | None:
        """Return the reward of the whole instance or None; called once at the end of the sample."""
        return None

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        """Close an instance; also called after failed calls."""
