"""Serialization of a `verl.protocol.DataProto`: tensors for pickle, and one safetensors file on disk."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from verl.utils.atomic_io import atomic_file
from verl.utils.proto_columns import object_array
from verl.utils.safetensors_file import save_safetensors

_FILE_FORMAT = "verl.DataProto/1"


def pack_tensor(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], np.ndarray]:
    """Return (dtype name, shape, bytes); bytes is a flat uint8 array that shares the memory of a contiguous CPU tensor.

    Pickle protocol 5 transfers numpy arrays out of band, but not torch tensors. Bytes fit any dtype.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), flat.view(torch.uint8).numpy()


def unpack_tensor(dtype: str, shape: tuple[int, ...], data: np.ndarray) -> torch.Tensor:
    """Return the tensor of `pack_tensor`; only read-only memory, as in Ray's object store, is copied."""
    writeable = data if data.flags.writeable else data.copy()
    return torch.from_numpy(writeable).view(getattr(torch, dtype)).reshape(shape)


def save(
    filepath: Path,
    rows: int | None,
    tensors: Mapping[str, torch.Tensor],
    columns: Mapping[str, np.ndarray],
    meta_info: Mapping[str, Any],
) -> None:
    """Write one safetensors file atomically: tensors and numeric arrays as such, all other values as JSON.

    Args:
        filepath: the file; missing directories are created.
        rows: the batch size of `tensors`, or None without a tensor table.
        tensors: tensor columns by name.
        columns: non-tensor columns by name.
        meta_info: values of the whole table.

    Raises:
        ValueError: JSON cannot restore an object column or meta value exactly (tuple, numpy scalar, ...).
        OSError: for example, the disk is full; an existing file of that name is unchanged.
    """
    stored = {f"batch/{key}": value for key, value in tensors.items()}
    objects, strings = {}, {}
    for key, column in columns.items():
        if column.dtype.kind in "biuf":
            stored[f"array/{key}"] = torch.from_numpy(np.array(column, order="C"))
        elif column.dtype.kind == "U":
            strings[key] = [str(column.dtype), column.tolist()]
        elif column.dtype == object and column.ndim == 1:
            for i, value in enumerate(column):
                _require_json(value, f"non_tensor_batch[{key!r}], row {i}")
            objects[key] = column.tolist()
        else:
            raise ValueError(
                f"non_tensor_batch[{key!r}] has dtype {column.dtype} and shape {column.shape}: "
                "only numbers, str and 1-D object arrays can be saved; convert the column or pop it"
            )
    _require_json(meta_info, "meta_info")
    rest = {"rows": rows, "order": list(columns), "objects": objects, "strings": strings, "meta_info": meta_info}
    stored["json"] = torch.frombuffer(bytearray(json.dumps(rest).encode()), dtype=torch.uint8)
    _write_safetensors(filepath, stored)


def load(
    filepath: Path,
) -> tuple[int | None, dict[str, torch.Tensor], dict[str, np.ndarray], dict[str, Any]]:
    """Return (rows, tensors, columns, meta_info) of a file of `save`; no code from the file is run.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, or `save` did not write it.
    """
    try:
        with safe_open(str(filepath), framework="pt") as file:
            if (file.metadata() or {}).get("format") != _FILE_FORMAT:
                raise ValueError(f"{filepath}: a safetensors file that DataProto.save_to_disk did not write")
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    except SafetensorError as error:
        raise ValueError(f"{filepath}: the DataProto file is damaged ({error}); write it again") from error
    rest = json.loads(stored.pop("json").numpy().tobytes())
    columns = {key: object_array(values) for key, values in rest["objects"].items()}
    columns |= {key: np.array(values, dtype=dtype) for key, (dtype, values) in rest["strings"].items()}
    columns |= {key.removeprefix("array/"): v.numpy() for key, v in stored.items() if key.startswith("array/")}
    tensors = {key.removeprefix("batch/"): v for key, v in stored.items() if key.startswith("batch/")}
    return rest["rows"], tensors, {key: columns[key] for key in rest["order"]}, rest["meta_info"]


def _require_json(value: Any, where: str) -> None:
    """Check that JSON restores `value` exactly.

    Raises:
        ValueError: it does not; `where` names the value in the message.
    """
    if value is None or type(value) in (bool, int, float, str):
        return
    if type(value) is list:
        for i, item in enumerate(value):
            _require_json(item, f"{where}[{i}]")
        return
    if type(value) is dict and all(type(key) is str for key in value):
        for key, item in value.items():
            _require_json(item, f"{where}[{key!r}]")
        return
    what = "a dict with keys that are not str" if type(value) is dict else f"a {type(value).__name__}"
    raise ValueError(
        f"{where} is {what}, which cannot be saved: use dict (str keys), list, str, int, float, bool or None, "
        "or pop it before saving"
    )


def _write_safetensors(filepath: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    filepath.parent.mkdir(parents=True, exist_ok=True)
    # safetensors rejects tensors that share memory, as the views of one table usually do.
    own = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    with atomic_file(filepath) as temporary:
        save_safetensors(own, temporary, file_format=_FILE_FORMAT)
