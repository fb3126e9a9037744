"""Atomic file writes: a file is complete or absent, even if the writer is killed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give the path of a temporary file to write, and rename it to `path` at the end of the block.

    `path` always holds the old or the new content, even after a power failure. If the block raises, `path` is unchanged
    and no temporary file remains.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        fsync_path(temporary)
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) as `atomic_file` describes; lone surrogates are written as U+FFFD.

    Raises:
        OSError: for example a missing directory or a full disk.
    """
    with atomic_file(Path(path)) as temporary:
        temporary.write_text(valid_text(text), encoding="utf-8")
