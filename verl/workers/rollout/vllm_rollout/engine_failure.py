"""The cause of an engine's failure: vLLM logs it in the engine's process and does not put it into its exceptions."""

from __future__ import annotations

import os
import re
import stat

# What vLLM's logger prints last of a traceback, such as
# "(EngineCore pid=7) ERROR 11-29 21:28:51 [core.py:1510] ValueError: the description has no entry ...".
_LAST_LINE = re.compile(
    r"^\((?!MainProcess)[^)]*\) ERROR .*?\[\w+\.py:\d+\] ((?:\w+\.)*\w*(?:Error|Exception)\b.*)$", re.M
)
# References in vLLM's messages to a log that the reader of the message does not see.
_ABOVE = re.compile(r"\s*See (?:stack trace|root cause) \(?above\)?[^.]*\.")
_OUTPUTS = (1, 2)
_READ = 1 << 18


def failure_text(error: BaseException) -> str:
    """Return an error of an engine as text, with the last exception that the engine's processes logged.

    They write to the outputs of this process. Ray sends these to files, which can be read; without files, or after a
    death without a traceback, the text is that of the error. Its reference to a "stack trace above" is left out.
    """
    found = [match for descriptor in _OUTPUTS for match in _LAST_LINE.findall(_tail(descriptor))]
    text = _ABOVE.sub("", str(error)) or type(error).__name__
    if found:
        return f"{found[-1]} ({text})"
    if text != str(error):
        text += " Its processes logged no error: they were killed, for lack of memory or from outside"
    return text.strip()


def _tail(descriptor: int) -> str:
    """Return the end of the file behind a descriptor; empty if it is not a file."""
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return ""
        # A descriptor of its own: this one is open for writing only.
        with open(f"/proc/self/fd/{descriptor}", "rb") as file:
            file.seek(max(0, os.fstat(descriptor).st_size - _READ))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
