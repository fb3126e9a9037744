"""Local copies of paths, under upstream verl's names."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from verl.utils import hdfs_io


def is_non_local(path: str | Path) -> bool:
    """Return True for an hdfs:// path."""
    return hdfs_io.is_remote(path)


def copy_to_local(
    src: str | Path,
    cache_dir: str | Path | None = None,
    filelock: str = ".file.lock",
    verbose: bool = False,
    always_recopy: bool = False,
    use_shm: bool = False,
) -> str:
    """Return the local path of `src`: itself, or for an hdfs:// path a copy in `cache_dir`.

    Args:
        src: a file or a directory; `~` of a local path is expanded.
        cache_dir: where to put the copy; None: a directory `verl-cache` in the system's directory of temporary files.
        filelock: no effect: a copy appears under its name when it is complete.
        verbose: no effect.
        always_recopy: replace an existing copy.
        use_shm: must be False.

    Raises:
        ValueError: an hdfs:// path and no command `hdfs`, or `use_shm`.
    """
    if use_shm:
        raise ValueError("copy_to_local: use_shm=True is not supported; copy the directory to /dev/shm yourself")
    if not hdfs_io.is_remote(src):
        return os.path.expanduser(src)
    folder = Path(cache_dir or Path(tempfile.gettempdir(), "verl-cache")).expanduser()
    # The name contains a hash of the path, so that two directories with the same name have two copies.
    target = folder / hashlib.sha256(str(src).encode()).hexdigest()[:16] / os.path.basename(str(src).rstrip("/"))
    if always_recopy or not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as unfinished:
            copied = Path(unfinished, target.name)
            hdfs_io.copy(src, copied)
            if target.is_dir():
                os.rename(target, Path(unfinished, "replaced"))
            os.replace(copied, target)
    return str(target)
