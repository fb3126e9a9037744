"""Atomic file writes: a file is complete or absent, even if the writer is killed."""

import os
from pathlib import Path

from verl.utils.text import valid_text


def fsync_path(path: str | Path) -> None:
    """Flush a file's bytes, or a directory's entries, from this host's page cache to the disk.

    The file may have been written by another process of the host: the cache belongs to the file, not to the writer.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) so that `path` always holds the old or the new content, even after a power failure.

    Lone surrogates are written as U+FFFD.

    Raises:
        OSError: for example a missing directory or a full disk; `path` is unchanged and no temporary file remains.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(valid_text(text))
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)
