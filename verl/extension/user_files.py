"""Files that the user names in a config or in another file: read YAML, import Python files, find top-level names."""

from __future__ import annotations

import ast
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from verl.extension.paths import expand_user
from verl.extension.user_modules import import_path
from verl.extension.yaml_file import read_node


def file_problem(path: str | Path) -> str | None:
    """Return why a path is not a file, with the absolute path that was tried; None if it is a file."""
    absolute = os.path.abspath(os.path.expanduser(path))
    # Unlike Path's methods, os.path's also return False for names that are too long for any file.
    if os.path.isfile(absolute):
        return None
    return f"{'is a directory' if os.path.isdir(absolute) else 'no such file'} (looked for {absolute})"


def read_yaml(path: str | Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        ValueError: the file is missing or unreadable, or as `read_node`; the message does not contain its name.
    """
    problem = file_problem(path)
    if problem is not None:
        raise ValueError(f"{problem}; give a YAML file")
    try:
        node = read_node(expand_user(path))
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    return None if node is None else yaml.SafeLoader("").construct_document(node)


def read_yaml_list(path: str, key: str, section: str | None = None, entry: str = "") -> list[tuple[str, Any]]:
    """Return the entries of a list in a YAML file, each with its location for error messages.

    Args:
        path: the file.
        key: config key that holds the path.
        section: key of the file that holds the list; None if the whole file is the list.
        entry: description of an entry, for the error message.

    Raises:
        ValueError: the file cannot be read, or has no list with at least one entry; the message begins with `key`.
    """
    try:
        content = read_yaml(path)
    except ValueError as error:
        raise ValueError(f"{key}={path}: {error}") from error
    entries, name = content, "a list"
    if section is not None:
        entries, name = content.get(section) if isinstance(content, dict) else None, f"a list '{section}'"
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{key}={path}: must contain {name} with at least one entry; write {entry}")
    return [(f"{key}={path}: {section or ''}[{i}]", item) for i, item in enumerate(entries)]


def check_unique(names: Sequence[str], location: str) -> None:
    """Check that no name occurs twice.

    Raises:
        ValueError: some do; the message begins with `location`.
    """
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise ValueError(f"{location}: duplicate name {', '.join(duplicates)}; give each entry its own name")


def import_file(path: Path) -> ModuleType:
    """Import a Python file and return its module; a process imports each file once.

    A file that raises counts as not imported. The file may import its neighbors; every process can import its module by
    name.

    Raises:
        Exception: any exception of the file.
    """
    return import_path(expand_user(path).resolve())


def top_level_names(tree: ast.Module) -> tuple[list[str], bool]:
    """Return the names that a module defines at its top level, and if it may define more.

    More names are possible after a star import, or with a function `__getattr__`.
    """
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
    """Return the blocks of statements of an `if`, `try`, `with` or loop."""
    bodies = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")]
    return bodies + [handler.body for handler in getattr(node, "handlers", [])]
