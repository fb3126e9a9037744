"""Files that are either whole or absent, whatever kills the writer."""

import os
from pathlib import Path


def fsync_path(path: str | Path) -> None:
    """Flush a file's bytes, or a directory's entries, from this host's page cache to the disk.

    It may be called on a file that another process of the host wrote: the cache belongs to the file, not to the writer.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) so that `path` holds the old or the new content at every moment, a power cut included.

    Raises:
        OSError: the directory is missing, the disk is full, ...; `path` is as before and no temporary file is left.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)
