"""Sizes in bytes as text."""

from __future__ import annotations

KIB, MIB, GIB = 2**10, 2**20, 2**30
GB = 10**9


def format_bytes(nbytes: float) -> str:
    """Return a size in B, KiB, MiB or GiB, the largest unit of which there is at least one, e.g. `1.5 GiB`."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:,.1f} {name}"
    return f"{nbytes:.0f} B"


def format_gb(nbytes: float) -> str:
    """Return a size in GB of 10^9 bytes, the unit in which vendors give the memory of a device, e.g. `1.5 GB`."""
    return f"{nbytes / GB:.1f} GB"
