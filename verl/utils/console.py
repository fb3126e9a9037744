"""Output to the console that never ends a run: the encoding may lack characters, and the reader may be gone."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

logger = logging.getLogger(__name__)


def escape_unencodable() -> None:
    """Make sys.stdout write characters that its encoding lacks as `\\u....` instead of raising an error."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def write_line(line: str, stream: TextIO | None = None) -> None:
    """Write one line and flush.

    If the reader is gone (a closed terminal, `| head`) or the disk is full, warn, and discard all later output.

    Args:
        line: without the line break.
        stream: sys.stdout at the time of the call by default.
    """
    output = sys.stdout if stream is None else stream
    try:
        try:
            output.write(line + "\n")
        except UnicodeEncodeError:
            encoding = getattr(output, "encoding", None) or "ascii"
            output.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        output.flush()
    except OSError as error:
        logger.warning("the console accepts no more output (%s); the run continues without it", error)
        # As Python's documentation of SIGPIPE recommends: otherwise the flush at exit fails again.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, output.fileno())
        os.close(nowhere)
