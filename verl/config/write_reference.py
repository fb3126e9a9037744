"""Writes docs/config.md, every key of the config, from the dataclasses; after changing one:
`python3 -m verl.config.write_reference`.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from verl.config.ppo import PPOConfig
from verl.config.schema import Key, key_of, show

_HEAD = """# Config reference

Written by `python3 -m verl.config.write_reference` from the dataclasses in `verl/trainer/config/`, which are
the source. Every key is given on the command line as `name=value`, or in a YAML file of the same shape; `verl check`
tells what a config makes of them.

"""


def reference() -> str:
    """The whole page."""
    return _HEAD + "\n\n".join(_section(name, cls, help) for name, cls, help in _sections(PPOConfig)) + "\n"


def _sections(cls: type, prefix: str = "", help: str = "") -> Iterator[tuple[str, type, str]]:
    """Every section that has keys of its own, as (dotted name, dataclass, help), from the outermost inwards."""
    hints = typing.get_type_hints(cls)
    inner = [(f, hints[f.name]) for f in dataclasses.fields(cls) if dataclasses.is_dataclass(hints[f.name])]
    if len(inner) < len(dataclasses.fields(cls)):
        yield prefix.rstrip("."), cls, help
    for field, section in inner:
        yield from _sections(section, f"{prefix}{field.name}.", key_of(field).help)


def _section(name: str, cls: type, help: str) -> str:
    hints, config = typing.get_type_hints(cls), cls()
    rows = [
        _row(field.name, hints[field.name], getattr(config, field.name), key_of(field))
        for field in dataclasses.fields(cls)
        if not dataclasses.is_dataclass(hints[field.name])
    ]
    title = f"## {name}" if name else "## Keys without a section"
    text = f"\n\n{help[:1].upper()}{help[1:]}." if help else ""
    return f"{title}{text}\n\n| key | default | values | what it does |\n|---|---|---|---|\n" + "\n".join(rows)


def _row(name: str, hint: Any, default: Any, known: Key) -> str:
    cells = [f"`{name}`", f"`{show(default)}`" if default != "" else '`""`', _values(hint, known), known.help]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _values(hint: Any, known: Key) -> str:
    """What may be given: choices where there are some, else the type with its bounds and unit."""
    if known.only is not None:
        return "only " + ", ".join(f"`{show(value)}`" for value in known.only)
    if known.choices:
        return ", ".join(f"`{show(value)}`" for value in known.choices)
    words = ["path" if known.path else _type_name(hint)]
    words += [f"in {known.unit}"] if known.unit else []
    bounds = (("at least", known.at_least), ("above", known.above), ("at most", known.at_most), ("below", known.below))
    words += [f"{word} {show(bound)}" for word, bound in bounds if bound is not None]
    return ", ".join([*words, *(["required"] if known.required else [])])


def _type_name(hint: Any) -> str:
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin in (list, tuple):
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return "mapping"
    if arguments:
        return " or ".join("null" if option is type(None) else _type_name(option) for option in arguments)
    return {int: "int", float: "number", str: "text", bool: "True or False"}.get(hint, "anything")


def main() -> None:
    """Write the page into the directory that is given, `docs` by default."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs") / "config.md"
    path.write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
