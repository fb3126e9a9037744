"""Dtypes that a config can name, with their sizes. Imports no torch."""

from __future__ import annotations

# Name in a config -> name in torch.
DTYPE_NAMES = {"float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}
_ITEMSIZE = {"float32": 4, "bfloat16": 2}


def itemsize(dtype: str) -> int:
    """Return the bytes of one element of `float32` (`fp32`) or `bfloat16` (`bf16`)."""
    return _ITEMSIZE[DTYPE_NAMES[dtype]]
