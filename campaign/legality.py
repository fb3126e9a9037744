"""Legal values of a config key, judged from its reference and independently of the code that accepts them."""

from __future__ import annotations

import math
import typing
from typing import Any

from verl.config.schema import Key

_LARGEST = 2**31 - 1


def why_illegal(name: str, known: Key, hint: Any, value: Any, output: str) -> str | None:
    """Return why a value must not be accepted; None if it is legal.

    A value without effect in the run is legal if the output names the key.

    Args:
        name: dotted name of the key.
        known: the properties that the reference shows.
        hint: the type that the reference shows.
        value: the value that Hydra reads from the command line.
        output: output of the command.
    """
    if value is None:
        return None if type(None) in _options(hint) or hint is Any else "accepted null"
    types = [option for option in _options(hint) if option is not type(None)]
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, float) and not math.isfinite(item) for item in items) and {int, float} & set(types):
        return f"accepted {value}"
    if isinstance(value, bool) and ("on" if value else "off") in known.choices:
        return None  # YAML reads these words as truth values
    if not any(_has_type(value, option) for option in types):
        return f"accepted {value!r}, which has another type"
    if known.same_if is not None:
        return None  # in some runs, every value means the same
    if known.only is not None or known.choices:
        allowed = [_text(choice) for choice in (known.only if known.only is not None else known.choices)]
        wrong = [item for item in items if _text(item) not in allowed]
        return f"accepted {wrong[0]!r} without a note" if wrong and not _is_named(name, output) else None
    numbers = [float(item) for item in items if not isinstance(item, bool) and _is_number(item)]
    beyond = [number for number in numbers if _is_beyond(known, number)]
    if beyond and not _is_named(name, output):
        return f"accepted {beyond[0]:g}, which is out of bounds"
    if known.path and isinstance(value, str) and value and not _is_output(name) and not _is_named(name, output):
        return f"accepted {value[:60]!r}, which does not exist"
    return None


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) not in (None, list, dict) else (hint,)


def _has_type(value: Any, option: Any) -> bool:
    """Return True if the command line can mean a value of the type: text stands for a number, and a scalar for text."""
    origin = typing.get_origin(option) or option
    if origin is Any:
        return True
    if origin is bool:
        return isinstance(value, bool) or str(value).lower() in ("true", "false")
    if origin is int:
        return not isinstance(value, bool) and _is_number(value) and _is_whole(float(value))
    if origin is float:
        return not isinstance(value, bool) and _is_number(value)
    if origin is str:
        return isinstance(value, str | int | float)
    if origin is list:
        inner = typing.get_args(option)[0]
        return all(_has_type(item, inner) for item in value) if isinstance(value, list) else inner is str
    return isinstance(value, dict)


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, list | dict) and math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _is_whole(number: float) -> bool:
    return number == int(number) and abs(number) <= _LARGEST


def _is_beyond(known: Key, number: float) -> bool:
    return (
        (known.at_least is not None and number < known.at_least)
        or (known.above is not None and number <= known.above)
        or (known.at_most is not None and number > known.at_most)
        or (known.below is not None and number >= known.below)
    )


def _text(value: Any) -> str:
    if value is None:
        return "null"
    # 1.0 and "1" mean 1.
    return f"{float(value):g}" if not isinstance(value, bool) and _is_number(value) else str(value)


def _is_output(name: str) -> bool:
    return name.startswith("trainer.") or name.endswith(("save_path", "dump_dir"))


def _is_named(name: str, output: str) -> bool:
    """Return True if the output names the key or one of its sections, which a note about a whole section does."""
    parts = name.split(".")
    return any(".".join(parts[:count]) in output for count in range(2, len(parts) + 1))
