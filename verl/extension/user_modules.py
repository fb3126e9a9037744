"""The package of the user's Python files: a module's name holds the path of its file.

Any process can therefore import such a module by its name alone. Pickle needs that: `multiprocessing` with spawn, Ray
and data loaders send a function as the name of its module. Files next to a user's file can be imported, too.
"""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import importlib.util
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import FrameType, ModuleType

from verl.extension.source import parse_python

# Makes this module a package, whose submodules `_Finder` finds.
__path__: list[str] = []

# Folders that `import_path` added to sys.path.
_folders: list[str] = []


def import_path(path: Path) -> ModuleType:
    """Import a Python file and return its module; a process imports each file once.

    Args:
        path: an absolute path.

    Raises:
        ImportError: the file imports a neighbor whose name another user's file has already taken; or see
            `import_named`.
        SystemExit, Exception: any exception of the file.
    """
    stem = re.sub(r"\W", "_", path.stem)
    return import_named(f"{__name__}.{stem}_{os.fsencode(path).hex()}")


def import_named(name: str) -> ModuleType:
    """Import a module of the user.

    Raises:
        ImportError: the module raised KeyboardInterrupt, GeneratorExit or another exception that callers do not expect
            from an import.
        KeyboardInterrupt: after Ctrl-C.
        SystemExit, Exception: any exception of the module.
    """
    with _recorded_interrupts() as interrupts:
        try:
            return importlib.import_module(name)
        except (Exception, SystemExit):
            raise
        except BaseException as error:
            if interrupts:
                raise
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
            place = f" in {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""
            raise ImportError(f"the module raised {type(error).__name__}{place}") from error


@contextmanager
def _recorded_interrupts() -> Iterator[list[int]]:
    """Record each Ctrl-C in a list, to tell its KeyboardInterrupt from one that a module raises."""
    interrupts: list[int] = []
    default = signal.default_int_handler
    if signal.getsignal(signal.SIGINT) is not default or threading.current_thread() is not threading.main_thread():
        yield interrupts  # Ctrl-C raises no KeyboardInterrupt here
        return

    def record(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        default(number, frame)

    signal.signal(signal.SIGINT, record)
    try:
        yield interrupts
    finally:
        if signal.getsignal(signal.SIGINT) is record:
            signal.signal(signal.SIGINT, default)


def imported_files(file: Path) -> list[Path]:
    """Return a user's file and the files beside it that it imports, directly or through each other; imports none.

    All Python files of an imported package beside it count. An import by a computed name is not found.

    Args:
        file: an absolute path.
    """
    folder, found, pending = file.parent, dict.fromkeys([file]), [file]
    while pending:
        for name in _neighbors(pending.pop(), folder):
            if _is_installed(name, folder):
                continue
            beside = [folder / f"{name}.py", *sorted((folder / name).rglob("*.py"))]
            new = [path for path in beside if path.is_file() and path not in found]
            found |= dict.fromkeys(new)
            pending += new
    return list(found)


def _is_installed(name: str, folder: Path) -> bool:
    """Return True if a top-level module is found elsewhere, so that an import does not find it in `folder`."""
    if name in sys.builtin_module_names:
        return True
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != folder.resolve()]
    spec = importlib.machinery.PathFinder.find_spec(name, elsewhere)
    # A folder without __init__.py has no origin, and does not hide a module.
    return spec is not None and spec.origin is not None


class _Finder:
    """Finds the submodules of this module for Python's import."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of a user's file; None for other modules."""
        package, _, encoded = name.rpartition(".")
        if package != __name__:
            return None
        try:
            file = Path(os.fsdecode(bytes.fromhex(encoded.rpartition("_")[2])))
        except ValueError:
            return None
        if not file.is_file():
            return None
        _add_folder(file)
        known = file.suffix in importlib.machinery.all_suffixes()
        loader = None if known else SourceFileLoader(name, str(file))
        return importlib.util.spec_from_file_location(name, file, loader=loader)


def _add_folder(file: Path) -> None:
    folder = str(file.parent)
    if folder not in sys.path:
        # At the end: neighbors of the file never hide an installed package.
        sys.path.append(folder)
    for name in _neighbors(file, file.parent):
        module = sys.modules.get(name)
        taken = None if module is None else getattr(module, "__file__", None)
        if taken is None or Path(taken).is_relative_to(folder):
            continue
        if any(Path(taken).is_relative_to(other) for other in _folders):
            raise ImportError(
                f"{file} imports {name}, but a module of this name is already imported from {taken}; rename one of them"
            )
    if folder not in _folders:
        _folders.append(folder)


def _neighbors(file: Path, folder: Path) -> Iterator[str]:
    """Yield the names that a file imports and that a file or a package in `folder` has."""
    try:
        tree = parse_python(file)
    except (OSError, SyntaxError, ValueError):
        return  # the import reports it
    for node in ast.walk(tree):
        modules = [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        for module in modules:
            name = (module or "").partition(".")[0]
            if name and ((folder / f"{name}.py").is_file() or (folder / name).is_dir()):
                yield name


sys.meta_path.append(_Finder)
