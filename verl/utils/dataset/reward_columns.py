"""The columns of a row that rewards read: `data_source`, `reward_model`, `extra_info`, `index`. Imports no torch."""

from __future__ import annotations

from typing import Any

from verl.utils.dataset.tools_kwargs import read_tools_kwargs


def pop_reward_columns(row: dict[str, Any], source_key: str, position: int) -> dict[str, Any]:
    """Remove the columns of the reward from a row and return them with the types that an item of a dataset has.

    Args:
        row: the columns of a file, by name.
        source_key: column of the data source.
        position: number of the row over all files, which is the index of a row without `extra_info.index`.

    Raises:
        ValueError: `reward_model` or `extra_info` is not a dict, or `extra_info.tools_kwargs` has another form.
    """
    source = row.pop(source_key, None)
    reward_model, extra_info = (_dict_cell(row, key) for key in ("reward_model", "extra_info"))
    read_tools_kwargs(extra_info)  # so that the error names the file
    index = extra_info.get("index")
    return {
        "data_source": "unknown" if source is None else str(source),
        "reward_model": reward_model,
        "extra_info": extra_info,
        "index": position if index is None else index,
    }


def _dict_cell(row: dict[str, Any], key: str) -> dict[str, Any]:
    value = row.pop(key, None)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{key!r} is a {type(value).__name__}; it must be a dict (a struct column in Parquet)")
    return value or {}
