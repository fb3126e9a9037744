"""The schema of a tool in OpenAI's function format, and the response of a tool."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class OpenAIFunctionPropertySchema(BaseModel):
    """One argument. Other keywords of JSON Schema (`items`, `minimum`, ...) are kept."""

    model_config = ConfigDict(extra="allow")

    type: str | list[str]
    description: str | None = None
    enum: list[Any] | None = None


class OpenAIFunctionParametersSchema(BaseModel):
    """The arguments of a function; `additionalProperties: true` allows other arguments."""

    model_config = ConfigDict(extra="allow")

    type: Literal["object"] = "object"
    properties: dict[str, OpenAIFunctionPropertySchema] = Field(default_factory=dict)
    required: list[str] = Field(default_factory=list)


class OpenAIFunctionSchema(BaseModel):
    """A function: its name, description and arguments."""

    name: str = Field(min_length=1)
    description: str
    parameters: OpenAIFunctionParametersSchema = Field(default_factory=OpenAIFunctionParametersSchema)
    strict: bool = False


class OpenAIFunctionToolSchema(BaseModel):
    """The description of a tool for the chat template."""

    type: Literal["function"] = "function"
    function: OpenAIFunctionSchema


class ToolResponse(BaseModel):
    """The response of a tool. Only text is supported; None counts as empty text."""

    text: str | None = None
    image: list[Any] | None = None
    video: list[Any] | None = None

    def is_empty(self) -> bool:
        """Return True if the response has no content."""
        return not self.text and not self.image and not self.video

    def is_text_only(self) -> bool:
        """Return True if the response has only text."""
        return bool(self.text) and not self.image and not self.video
