"""Classes that a user's YAML file names: `package.module.Class`, or `path/to/file.py:Class`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path

from verl.extension.paths import expand_user
from verl.extension.source import parse_python
from verl.extension.user_files import file_problem, import_file, top_level_names
from verl.extension.user_modules import import_named


class UserClassError(ValueError):
    """A class cannot be found or imported; the message begins with its specification."""


def split_spec(spec: str, folder: Path) -> tuple[Path | str, str]:
    """Return the file or the module of a class, and the name of the class.

    Args:
        spec: `package.module.Class`, or `path/to/file.py:Class`.
        folder: base of a relative file.

    Raises:
        UserClassError: `spec` has neither form.
    """
    source, colon, name = spec.rpartition(":")
    if colon and source.endswith(".py") and name.isidentifier():
        return folder / expand_user(source), name
    module, dot, name = spec.rpartition(".")
    if not colon and dot and all(part.isidentifier() for part in [*module.split("."), name]):
        return module, name
    raise UserClassError(f"{spec!r}: give package.module.Class, or path/to/file.py:Class")


def check_class(spec: str, folder: Path) -> None:
    """Check that a class exists, as far as this is possible without importing anything.

    A file must be valid Python and define the name. Of a module, only its top-level package must exist.

    Args:
        spec: `package.module.Class`, or `path/to/file.py:Class`.
        folder: base of a relative file.

    Raises:
        UserClassError: the class does not exist.
    """
    source, name = split_spec(spec, folder)
    if isinstance(source, str):
        package = source.partition(".")[0]
        if package not in sys.modules and importlib.util.find_spec(package) is None:
            raise UserClassError(f"{spec}: no module {package} in sys.path; correct the name, or give a file")
        return
    _check_file(spec, source)
    try:
        tree = parse_python(source)
    except OSError as error:
        raise UserClassError(f"{spec}: {source} cannot be read ({error.strerror})") from error
    except (SyntaxError, ValueError) as error:
        raise UserClassError(f"{spec}: {source} is not valid Python ({error})") from error
    names, may_define_more = top_level_names(tree)
    if name not in names and not may_define_more:
        present = ", ".join(sorted(set(names))) or "nothing"
        raise UserClassError(f"{spec}: {source} has no class {name}; it has {present}; correct the name")


def load_class(spec: str, folder: Path, base: type) -> type:
    """Import a class.

    Args:
        spec: `package.module.Class`, or `path/to/file.py:Class`.
        folder: base of a relative file.
        base: required base class.

    Raises:
        UserClassError: the class does not exist, its module does not import, it is not a subclass of `base`, or it
            overrides a method that is never called.
    """
    source, name = split_spec(spec, folder)
    if isinstance(source, Path):
        _check_file(spec, source)
    try:
        module = import_named(source) if isinstance(source, str) else import_file(source)
    except (Exception, SystemExit) as error:  # the user's module may raise any exception
        raise UserClassError(f"{spec} does not import: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        problem = "does not exist" if found is None else f"is not a subclass of {base.__module__}.{base.__name__}"
        raise UserClassError(f"{spec}: {name} {problem}")
    refuse_uncalled(found, base)
    return found


def refuse_uncalled(cls: type, base: type) -> None:
    """Check that a user's class overrides no method that is called only in upstream verl.

    Such a method would be ignored in silence. A base class lists these methods in `uncalled_methods`, a mapping from
    the name of a method to the advice for the error message.

    Raises:
        UserClassError: names the methods.
    """
    advice: Mapping[str, str] = getattr(base, "uncalled_methods", {})
    own = [parent for parent in cls.__mro__ if parent not in base.__mro__]
    found = [name for name in advice if any(name in vars(parent) for parent in own)]
    if found:
        raise UserClassError(
            f"{cls.__qualname__} overrides methods of upstream verl's {base.__name__} that are never called here: "
            + "; ".join(f"{name}: {advice[name]}" for name in found)
        )


def _check_file(spec: str, path: Path) -> None:
    problem = file_problem(path)
    if problem is not None:
        raise UserClassError(f"{spec}: {problem}")
