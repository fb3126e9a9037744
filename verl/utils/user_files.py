"""Files that the user names in a config or in another file: why one cannot be read, and modules from Python files."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml


def file_problem(path: str | Path) -> str | None:
    """What is wrong with a path that has to be a file's, and where it was looked for; None for a file."""
    place = os.path.abspath(os.path.expanduser(path))
    # Unlike Path's, these two answer for names that no file could have as well.
    if os.path.isfile(place):
        return None
    return f"{'is a directory' if os.path.isdir(place) else 'no such file'} (looked for {place})"


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds.

    Raises:
        ValueError: what is wrong with the file, without its name.
    """
    problem = file_problem(path)
    if problem is not None:
        raise ValueError(f"{problem}; give a YAML file")
    try:
        return yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"is not YAML ({' '.join(str(error).split())})") from error
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error


def import_file(path: Path) -> ModuleType:
    """The module of a Python file, imported once in a process; one that fails half way counts as not imported.

    Raises:
        Exception: whatever the file raises.
    """
    path = path.expanduser().resolve()
    # Of the path, so that two files of one name do not get in each other's way.
    name = f"verl_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def top_level_names(tree: ast.Module) -> tuple[list[str], bool]:
    """Names that the module defines, and whether it may define others (a star import, or `__getattr__`)."""
    names: list[str] = []
    open_ended = False
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop(0)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
            open_ended |= node.name == "__getattr__"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names += [(alias.asname or alias.name).split(".")[0] for alias in node.names]
            open_ended |= any(alias.name == "*" for alias in node.names)
        else:
            names += [
                inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)
            ]
            pending += [statement for body in _bodies(node) for statement in body]
    return names, open_ended


def _bodies(node: ast.stmt) -> list[list[ast.stmt]]:
    """The statements that an `if`, `try`, `with` or loop may run."""
    bodies = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")]
    return bodies + [handler.body for handler in getattr(node, "handlers", [])]
