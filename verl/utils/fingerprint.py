"""Fingerprints of files, to find out if a file has the same content as at an earlier time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

from verl.utils.host import cpu_cores

# A larger file is sampled: an optimizer step changes nearly all bytes of weights, and an edit of text usually the size.
FULL_BYTES = 256 << 20
_BLOCKS, _BLOCK_BYTES = 64, 64 << 10
_READ_BYTES = 4 << 20
_MAX_THREADS = 16


class Fingerprint(TypedDict):
    """Size and hash of a file.

    Keys:
        bytes: size.
        blake2b: BLAKE2b, 16 bytes in hexadecimal: of the whole file, or of 64 blocks of 64 KiB if `sampled`. The blocks
            are evenly spaced; the first and the last bytes of the file are among them.
        sampled: True for a file of more than 256 MiB. A change between the blocks that keeps the size is not seen.
    """

    bytes: int
    blake2b: str
    sampled: bool


def fingerprints(paths: Iterable[Path]) -> list[Fingerprint | None]:
    """Return the fingerprint of each file, computed by several threads; None for a file that cannot be read."""
    with ThreadPoolExecutor(min(_MAX_THREADS, cpu_cores())) as pool:
        return list(pool.map(_fingerprint, paths))


def _fingerprint(path: Path) -> Fingerprint | None:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size > FULL_BYTES:
                for block in range(_BLOCKS):
                    start = block * (size - _BLOCK_BYTES) // (_BLOCKS - 1)
                    digest.update(os.pread(file.fileno(), _BLOCK_BYTES, start))
            else:
                while data := file.read(_READ_BYTES):
                    digest.update(data)
    except OSError:
        return None
    return {"bytes": size, "blake2b": digest.hexdigest(), "sampled": size > FULL_BYTES}
