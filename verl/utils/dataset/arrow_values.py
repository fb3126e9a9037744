"""From Arrow values to the values that the same rows have in a JSON file, for every type that data libraries write.

pyarrow converts most types itself. These need a conversion, at any depth:

- `arrow.json` (datasets 4.7 and newer, JSON columns of DuckDB): text that holds the value;
- map: a list of pairs in pyarrow, a dict here;
- padding: a column of structs has every field of every row, so a row has null fields that its author did not write.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pyarrow as pa

Convert = Callable[[Any], Any]

# Field of `extra_info` whose structs are padded: their keys are names of tools and keywords of functions.
_KEYWORDS = "tools_kwargs"


def converter(field: pa.Field, *, drop_padding: bool = False) -> Convert | None:
    """Return the function that converts the values of pyarrow's `as_py`; None if they are right.

    Args:
        field: a column or a part of one.
        drop_padding: remove the null fields of structs at any depth; `tools_kwargs` always does.
    """
    convert = _converter(field, drop_padding or field.name == _KEYWORDS)
    return None if convert is None else partial(_unless_null, convert)


# Partial functions and no closures, because datasets are pickled.


def _converter(field: pa.Field, drop_padding: bool) -> Convert | None:
    kind = field.type
    if is_json(field):
        return json.loads
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_struct(kind):
        converters = {part.name: converter(part, drop_padding=drop_padding) for part in kind}
        if drop_padding:
            return partial(_filled_fields, converters)
        needed = {name: convert for name, convert in converters.items() if convert is not None}
        return partial(_fields, needed) if needed else None
    if pa.types.is_map(kind):
        return partial(_from_pairs, converter(kind.item_field, drop_padding=drop_padding))
    if is_list(kind):
        of_item = converter(kind.value_field, drop_padding=drop_padding)
        return None if of_item is None else partial(_items, of_item)
    return None


def _unless_null(convert: Convert, value: Any) -> Any:
    return None if value is None else convert(value)


def _fields(converters: dict[str, Convert], row: dict[str, Any]) -> dict[str, Any]:
    return row | {name: convert(row[name]) for name, convert in converters.items()}


def _filled_fields(converters: dict[str, Convert | None], row: dict[str, Any]) -> dict[str, Any]:
    return {name: _apply(converters[name], value) for name, value in row.items() if value is not None}


def _from_pairs(convert: Convert | None, pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    return {key: _apply(convert, value) for key, value in pairs}


def _items(convert: Convert, items: list[Any]) -> list[Any]:
    return [convert(item) for item in items]


def _apply(convert: Convert | None, value: Any) -> Any:
    return value if convert is None else convert(value)


def is_json(field: pa.Field) -> bool:
    """Return True for a field of the type `arrow.json`, which old releases of pyarrow show only in its metadata."""
    name = getattr(field.type, "extension_name", None) or (field.metadata or {}).get(b"ARROW:extension:name", b"")
    return name in ("arrow.json", b"arrow.json")


def is_list(kind: pa.DataType) -> bool:
    """Return True for every list type: offsets of 32 or 64 bits, views, fixed size."""
    return kind.id in _LISTS


_LISTS = {
    kind.id
    for kind in (
        *(pa.list_(pa.null()), pa.large_list(pa.null()), pa.list_(pa.null(), 1)),
        *(pa.list_view(pa.null()), pa.large_list_view(pa.null())),
    )
}


def binary_part(field: pa.Field, path: str = "") -> str | None:
    """Return the path of the first part of a column that holds bytes, such as `prompt[].content`, or None."""
    path = path or field.name
    kind = field.type
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        parts = [(part, f"{path}.{part.name}") for part in kind]
    elif pa.types.is_map(kind):
        parts = [(kind.key_field, f"{path}.key"), (kind.item_field, f"{path}.value")]
    elif is_list(kind):
        parts = [(kind.value_field, f"{path}[]")]
    else:
        tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
        return path if any(test(kind) for test in tests) else None
    return next((found for part, name in parts if (found := binary_part(part, name)) is not None), None)
