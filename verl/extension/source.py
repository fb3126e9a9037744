"""Source code of user files, parsed without running it."""

import ast
import gc
from pathlib import Path


def parse_python(file: Path) -> ast.Module:
    """Parse a Python file.

    Raises:
        OSError: the file cannot be read.
        SyntaxError: the file is not valid Python, or nested deeper than Python can parse.
        ValueError: the file contains null bytes.
    """
    source = file.read_bytes()
    # Python before 3.11.8 and 3.12.2 fails with SystemError where a parser runs inside a parser (CPython #106905).
    # The collector may cause that: it logs tasks that ended with an error, and the traceback module parses their lines.
    collects = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(source, filename=str(file))
    except (RecursionError, MemoryError) as error:
        raise SyntaxError("nested too deeply") from error
    finally:
        if collects:
            gc.enable()
