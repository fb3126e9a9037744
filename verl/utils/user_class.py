"""Classes that a user's YAML file names: `package.module.Class`, or `path/to/file.py:Class`."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from pathlib import Path

from verl.utils.user_files import file_problem, import_file, top_level_names


class UserClassError(ValueError):
    """A class cannot be had; the message names it and says why."""


def split_spec(spec: str, folder: Path) -> tuple[Path | str, str]:
    """The file (relative ones are looked for in `folder`) or the module, and the class.

    Raises:
        UserClassError: it is neither form.
    """
    place, colon, name = spec.rpartition(":")
    if colon and place.endswith(".py") and name.isidentifier():
        return folder / Path(place).expanduser(), name
    module, dot, name = spec.rpartition(".")
    if not colon and dot and all(part.isidentifier() for part in [*module.split("."), name]):
        return module, name
    raise UserClassError(f"{spec!r}: give package.module.Class, or path/to/file.py:Class")


def check_class(spec: str, folder: Path) -> None:
    """Look for a class without importing anything: its file compiles and defines the name, or its package is there.

    Raises:
        UserClassError: it is not there.
    """
    place, name = split_spec(spec, folder)
    if isinstance(place, str):
        root = place.partition(".")[0]
        if root not in sys.modules and importlib.util.find_spec(root) is None:
            raise UserClassError(f"{spec}: there is no module {root} (looked for in sys.path); mend it, or name a file")
        return
    _check_file(spec, place)
    try:
        tree = ast.parse(place.read_bytes(), filename=str(place))
    except OSError as error:
        raise UserClassError(f"{spec}: {place} cannot be read ({error.strerror})") from error
    except (SyntaxError, ValueError) as error:
        raise UserClassError(f"{spec}: {place} is not valid Python ({error})") from error
    names, open_ended = top_level_names(tree)
    if name not in names and not open_ended:
        there = ", ".join(sorted(set(names))) or "nothing"
        raise UserClassError(f"{spec}: {place} has no class {name}; it has {there}")


def load_class(spec: str, folder: Path, base: type) -> type:
    """Import the class.

    Args:
        spec: `package.module.Class`, or `path/to/file.py:Class`.
        folder: where a relative file is looked for.
        base: what it has to be a subclass of.

    Raises:
        UserClassError: it is not there, does not import, or is no subclass of `base`.
    """
    place, name = split_spec(spec, folder)
    if isinstance(place, Path):
        _check_file(spec, place)
    try:
        module = importlib.import_module(place) if isinstance(place, str) else import_file(place)
    except Exception as error:  # whatever the user's module raises
        raise UserClassError(f"{spec} does not import: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        problem = "does not exist" if found is None else f"is not a subclass of {base.__module__}.{base.__name__}"
        raise UserClassError(f"{spec}: {name} {problem}")
    return found


def _check_file(spec: str, path: Path) -> None:
    problem = file_problem(path)
    if problem is not None:
        raise UserClassError(f"{spec}: {problem}")
