"""Messages between the driver and its agent-loop workers: pickled, over a socket pair on one host.

| from the driver | from a worker |
|---|---|
| `Setup` once, then: | `Ready` or a `Failed` with number -1 once, then: |
| `Run`: start a loop | `Done`, `Failed`: end of a loop |
| `Cancel`: cancel a loop | `Ask`: generate a response on a replica |
| `Done`, `Failed`: end of an `Ask` | `Cancel`: cancel an `Ask` |

Results and errors are pickled separately, so that one that the other side cannot read does not damage the others.
"""

from __future__ import annotations

import asyncio
import pickle
import struct
import traceback
from dataclasses import dataclass
from typing import Any

from verl.config import PPOConfig
from verl.timeline.spans import Timeline

HEAD = struct.Struct("!Q")


@dataclass(frozen=True)
class Setup:
    """First message to a worker; `timeline` is the argument of `join_timeline`."""

    config: PPOConfig
    timeline: Timeline | None


@dataclass(frozen=True)
class Ready:
    """The default agent loop is set up."""


@dataclass(frozen=True)
class Run:
    """Run the agent loop `name` for a row."""

    number: int
    name: str
    sampling_params: dict[str, Any]
    row: dict[str, Any]


@dataclass(frozen=True)
class Ask:
    """Arguments of `LLMServerClient.generate`."""

    number: int
    prompt_ids: list[int]
    sampling_params: dict[str, Any]
    session: str | None


@dataclass(frozen=True)
class Cancel:
    """Cancel the `Run` or `Ask` of this number."""

    number: int


@dataclass(frozen=True)
class Done:
    """Pickled result of the `Run` or `Ask` of this number."""

    number: int
    result: bytes

    @property
    def value(self) -> Any:
        return pickle.loads(self.result)


@dataclass(frozen=True)
class Failed:
    """An error of the `Run` or `Ask` of this number, as text and pickled; the latter is empty if it cannot be."""

    number: int
    text: str
    error: bytes

    @property
    def exception(self) -> BaseException:
        """The error, with its traceback as a note; a RuntimeError with the text if its type is not known here."""
        try:
            error = pickle.loads(self.error)
        except Exception:  # noqa: BLE001  (a class of the user, who may raise anything)
            return RuntimeError(self.text)
        if not isinstance(error, BaseException):
            return RuntimeError(self.text)
        error.add_note(self.text)
        return error


def failed(number: int, error: BaseException) -> Failed:
    """Return the message for an error."""
    text = "".join(traceback.format_exception(error))
    try:
        return Failed(number, text, pickle.dumps(error))
    except Exception:  # noqa: BLE001  (pickle calls methods of the user's class)
        return Failed(number, text, b"")


def encode(message: Any) -> bytes:
    """Return a message with its length."""
    body = pickle.dumps(message)
    return HEAD.pack(len(body)) + body


async def receive(reader: asyncio.StreamReader) -> Any:
    """Return the next message.

    Raises:
        asyncio.IncompleteReadError: the other side has closed the connection.
        ConnectionError: it has died.
    """
    (size,) = HEAD.unpack(await reader.readexactly(HEAD.size))
    return pickle.loads(await reader.readexactly(size))
