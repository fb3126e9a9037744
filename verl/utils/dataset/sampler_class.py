"""The class that `data.sampler` names; nothing is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from verl.extension.user_class import UserClassError, check_class

KEY = "data.sampler.class_path"


class SamplerSection(Protocol):
    """The keys of `data.sampler`."""

    class_path: str | None
    class_name: str | None


def sampler_spec(path: str, name: str) -> str:
    """Return the specification of the class, as `verl.extension.user_class` reads it.

    Args:
        path: a Python file, `file://` and a Python file, a module, or `pkg://` and a module, as in upstream verl.
        name: name of the class.
    """
    if path.startswith("pkg://"):
        return f"{path.removeprefix('pkg://').replace('/', '.')}.{name}"
    file = path.removeprefix("file://")
    return f"{file}:{name}" if file.endswith(".py") or "/" in file else f"{file}.{name}"


def sampler_problem(section: SamplerSection) -> str | None:
    """Return the error text if the class of `data.sampler` cannot exist; nothing is imported. None without an error."""
    if section.class_path is None:
        return None
    if not section.class_name:
        return f"data.sampler.class_name is not set: give the class's name in {KEY}={section.class_path}"
    try:
        check_class(sampler_spec(section.class_path, section.class_name), Path.cwd())
    except UserClassError as error:
        return f"{KEY}={section.class_path}: {error}"
    return None
