"""Dtypes that a config can name: their sizes, and the choice for `auto`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from verl.utils.host import cpu_features

# Name in a config -> name in torch.
DTYPE_NAMES = {"float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}
# Without one of these a CPU computes bfloat16 by conversion, several times slower than float32.
_CPU_BFLOAT16 = ("avx512_bf16", "amx_bf16")
_ITEMSIZE = {"float32": 4, "bfloat16": 2}


def itemsize_of(dtype: str) -> int:
    """Return the bytes of one element of `float32` (`fp32`) or `bfloat16` (`bf16`)."""
    return _ITEMSIZE[DTYPE_NAMES[dtype]]


@dataclass(frozen=True)
class DtypeChoice:
    """Name of a torch dtype (`float32`, `bfloat16`), and the reason for it."""

    name: str
    why: str


def choose_dtype(device: str, requested: str = "auto", *, cpuinfo: str | None = None) -> DtypeChoice:
    """Return the dtype to compute in: the requested one or, for `auto`, the one that is fast on the device.

    Args:
        requested: `auto`, `float32` (`fp32`) or `bfloat16` (`bf16`).
        cpuinfo: text to read instead of `/proc/cpuinfo`.

    Raises:
        ValueError: another dtype.
    """
    if requested != "auto":
        if requested not in DTYPE_NAMES:
            raise ValueError(f"dtype={requested!r} is not supported: use auto, float32 or bfloat16")
        return DtypeChoice(DTYPE_NAMES[requested], "as configured")
    if device != "cpu":
        return DtypeChoice("bfloat16", f"auto: {device} computes bfloat16 natively")
    native = [flag for flag in _CPU_BFLOAT16 if flag in cpu_features(cpuinfo)]
    if native:
        return DtypeChoice("bfloat16", f"auto: this CPU has {native[0]}")
    return DtypeChoice("float32", f"auto: this CPU has neither {' nor '.join(_CPU_BFLOAT16)}, bfloat16 would be slow")
