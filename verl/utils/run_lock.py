"""The lock of a run's directory: two runs at once would mix their checkpoints and logs.

`flock` releases the lock when the process ends in any way, a kill included.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
# `lock_holder` of another process holds the lock for an instant.
_TRIES, _WAIT_SECONDS = 10, 0.1
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunLockedError(OSError):
    """Another run writes to the directory."""


@contextmanager
def run_lock(directory: str | Path) -> Iterator[None]:
    """Hold the lock of `directory`, which is created if it does not exist.

    A file system without locks is not locked, with a warning.

    Raises:
        RunLockedError: another run holds the lock; the message names its process and host.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    fd = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _acquire(fd, directory)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started})
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{text}\n".encode(), 0)
        yield
        os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def lock_holder(directory: str | Path) -> str | None:
    """Describe the run that holds the lock of `directory`; None if no run does."""
    try:
        fd = os.open(Path(directory) / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _describe(fd)
    except OSError:
        return None
    finally:
        os.close(fd)
    return None


def _acquire(fd: int, directory: Path) -> None:
    for attempt in range(_TRIES):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if attempt == _TRIES - 1:
                raise RunLockedError(locked_text(directory, _describe(fd))) from None
            time.sleep(_WAIT_SECONDS)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning("%s is on a file system without locks: start only one run there (%s)", directory, error)
            return


def locked_text(directory: str | Path, holder: str) -> str:
    """Return the error text about a directory whose lock is held by `holder`."""
    return (
        f"trainer.default_local_dir={directory}: {holder} writes to this directory; wait until it ends, or choose "
        "another directory (trainer.resume_mode=resume_path and trainer.resume_from_path read a checkpoint from here)"
    )


def _describe(fd: int) -> str:
    try:
        holder = json.loads(os.pread(fd, 1 << 12, 0))
        return f"another run (process {holder['pid']} on {holder['host']}, started {holder['started']})"
    except (ValueError, KeyError, TypeError):
        return "another run"
