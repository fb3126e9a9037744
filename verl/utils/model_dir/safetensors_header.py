"""The header of a safetensors file: names, shapes and dtypes of its tensors, without their data.

Layout of a file: 8 bytes little-endian length of the header, the header as JSON, the data (safetensors format
description).
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.utils.model_dir.errors import ModelFilesError

# The limit of the safetensors library itself, in bytes.
_MAX_HEADER = 100_000_000
# Bits of an element, by the dtype names of the safetensors format.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and dtype (the name of the safetensors format, such as `BF16`) of a stored tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in its file."""
        return -(-math.prod(self.shape) * _BITS[self.dtype] // 8)


def read_safetensors_header(path: Path) -> dict[str, TensorInfo]:
    """Read the tensors of a safetensors file and check the header against the size of the file.

    Raises:
        ModelFilesError: the file is damaged or truncated.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _damaged(path, f"it has {size} bytes, too few for a header")
        length = struct.unpack("<Q", prefix)[0]
        if length > min(_MAX_HEADER, size - 8):
            raise _damaged(path, f"its header should have {length} bytes, but the file has {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        raise _damaged(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors, places = {}, []
    for name, entry in header.items():
        tensors[name], begin, end = _read_entry(path, name, entry)
        places.append((begin, end, name))
    end = 0
    for begin, tensor_end, name in sorted(places):
        if begin != end:  # the library refuses such a file too
            raise _damaged(path, f"the data of {name} begins at byte {begin}, expected {end}")
        end = tensor_end
    if end != size - 8 - length:
        problem = "truncated" if end > size - 8 - length else "longer than its header says"
        raise _damaged(path, f"{problem}: it has {size} bytes, expected {end + 8 + length}")
    return tensors


def _read_entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    """Return a tensor, and the begin and the end of its data relative to the end of the header."""
    try:
        start, end = entry["data_offsets"]
        info = TensorInfo(tuple(entry["shape"]), entry["dtype"])
        sizes_fit = all(type(size) is int and size >= 0 for size in info.shape)
        consistent = sizes_fit and 0 <= start <= end and end - start == info.nbytes
    except (KeyError, TypeError, ValueError):
        raise _damaged(path, f"its header does not describe {name} in a known way: {entry}") from None
    if not consistent:
        raise _damaged(path, f"its header contradicts itself about {name}: {entry}")
    return info, start, end


def _damaged(path: Path, problem: str) -> ModelFilesError:
    return ModelFilesError(f"{path.name} is damaged: {problem}; copy or download it again")
