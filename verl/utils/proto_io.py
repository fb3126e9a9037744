"""How the columns of a `verl.protocol.DataProto` are pickled and kept on disk."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from verl.utils.atomic_io import fsync_path
from verl.utils.proto_columns import object_array

_FILE_FORMAT = "verl.DataProto/1"


def pack_tensor(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], np.ndarray]:
    """(dtype name, shape, bytes): bytes as a flat uint8 array that shares memory with a contiguous CPU tensor.

    Plain arrays travel out of band under pickle protocol 5, unlike torch tensors, and any dtype fits.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), flat.view(torch.uint8).numpy()


def unpack_tensor(dtype: str, shape: tuple[int, ...], data: np.ndarray) -> torch.Tensor:
    """The inverse of `pack_tensor`; copies only memory that must not be written to, as in Ray's object store."""
    writeable = data if data.flags.writeable else data.copy()
    return torch.from_numpy(writeable).view(getattr(torch, dtype)).reshape(shape)


def save(
    filepath: Path,
    rows: int | None,
    tensors: Mapping[str, torch.Tensor],
    columns: Mapping[str, np.ndarray],
    meta_info: Mapping[str, Any],
) -> None:
    """Write one safetensors file, whole or not at all: tensors and number arrays as such, the rest as JSON.

    Args:
        rows: the batch size of `tensors`, or None where there is no tensor table at all.

    Raises:
        ValueError: an object column or meta value that JSON cannot give back as it is (tuple, numpy scalar, ...).
        OSError: the disk is full, ...; an older file of that name is untouched.
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
    """Read what `save` wrote, as its arguments; no code from the file is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not whole, or was not written by `save`.
    """
    try:
        with safe_open(str(filepath), framework="pt") as file:
            if (file.metadata() or {}).get("format") != _FILE_FORMAT:
                raise ValueError(f"{filepath}: a safetensors file, but not one written by DataProto.save_to_disk")
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    except SafetensorError as error:
        raise ValueError(f"{filepath}: not a whole DataProto file ({error}); it has to be written again") from error
    rest = json.loads(stored.pop("json").numpy().tobytes())
    columns = {key: object_array(values) for key, values in rest["objects"].items()}
    columns |= {key: np.array(values, dtype=dtype) for key, (dtype, values) in rest["strings"].items()}
    columns |= {key.removeprefix("array/"): v.numpy() for key, v in stored.items() if key.startswith("array/")}
    tensors = {key.removeprefix("batch/"): v for key, v in stored.items() if key.startswith("batch/")}
    return rest["rows"], tensors, {key: columns[key] for key in rest["order"]}, rest["meta_info"]


def _require_json(value: Any, where: str) -> None:
    """Raise unless `value` comes back from JSON exactly as it is."""
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
    temporary = filepath.with_name(f".{filepath.name}.tmp-{os.getpid()}")
    # safetensors refuses tensors that share memory, which views of one table usually do
    own = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    try:
        safetensors.torch.save_file(own, str(temporary), metadata={"format": _FILE_FORMAT})
        fsync_path(temporary)
        os.rename(temporary, filepath)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(filepath.parent)
