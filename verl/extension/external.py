"""Import the user's modules, which register estimators, losses, agent loops and models (`model.external_lib`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from verl.extension.user_files import file_problem, import_file
from verl.extension.user_modules import import_named

KEY = "actor_rollout_ref.model.external_lib"
# Names the modules to the processes of an engine, which read no config.
ENVIRONMENT = "VERL_EXTERNAL_LIB"


class ExternalLibError(ValueError):
    """A module of the user cannot be imported; the message contains its name and the reason."""


def absolute(libs: Sequence[str]) -> list[str]:
    """Return the modules with absolute file paths, because other processes have other working directories."""
    return [os.path.abspath(os.path.expanduser(lib)) if is_file_name(lib) else lib for lib in libs]


def is_file_name(lib: str) -> bool:
    """Return True for a file, `path/to/mine.py`, and False for a module, `package.module`."""
    return lib.endswith(".py") or os.sep in lib


def import_external(libs: Sequence[str]) -> None:
    """Import modules by name and files by path, each at most once in a process.

    Raises:
        ExternalLibError: a module does not exist or does not import.
    """
    for lib in libs:
        problem = file_problem(lib) if is_file_name(lib) else None
        if problem is not None:
            raise ExternalLibError(f"{KEY}={lib}: {problem}; give a Python file, or the name of a module")
        try:
            import_file(Path(lib)) if is_file_name(lib) else import_named(lib)
        except (Exception, SystemExit) as error:
            raise ExternalLibError(
                f"{KEY}={lib} does not import: {type(error).__name__}: {error}; correct the module, or leave it out"
            ) from error


def environment_of(libs: Sequence[str]) -> dict[str, str]:
    """Return the environment in which `import_from_environment` imports these modules."""
    return {ENVIRONMENT: os.pathsep.join(libs)} if libs else {}


def import_from_environment() -> None:
    """Import the modules that `environment_of` gave to this process; ExternalLibError if one does not import."""
    import_external([lib for lib in os.environ.get(ENVIRONMENT, "").split(os.pathsep) if lib])
