"""Imports the user's own modules, which register estimators, losses and agent loops."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

KEY = "actor_rollout_ref.model.external_lib"


class ExternalLibError(ValueError):
    """A module of the user's cannot be imported; the message names it and why."""


def absolute(libs: Sequence[str]) -> list[str]:
    """The same modules, files by their absolute path: other processes have other working directories."""
    return [os.path.abspath(os.path.expanduser(lib)) if is_file_name(lib) else lib for lib in libs]


def is_file_name(lib: str) -> bool:
    """Whether `lib` means a file, `path/to/mine.py`, rather than a module, `package.module`."""
    return lib.endswith(".py") or os.sep in lib


def import_external(libs: Sequence[str]) -> None:
    """Import modules by name and files by path; what is imported already is left alone.

    Raises:
        ExternalLibError: one does not exist or does not import.
    """
    for lib in libs:
        try:
            _import_file(lib) if is_file_name(lib) else importlib.import_module(lib)
        except ExternalLibError:
            raise
        except Exception as error:
            raise ExternalLibError(
                f"{KEY}={lib} does not import: {type(error).__name__}: {error}; mend it, or leave it out"
            ) from error


def _import_file(lib: str) -> None:
    path = Path(lib).expanduser().absolute()
    if not path.is_file():
        raise ExternalLibError(f"{KEY}={lib}: no such file (looked for {path}); give a Python file or a module's name")
    # Of the path, so that two files of one name do not get in each other's way.
    name = f"verl_external_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
