"""Directories and copies of local paths, and of hdfs:// paths if the command `hdfs` is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

_SCHEME = "hdfs://"


def is_remote(path: str | Path) -> bool:
    """Return True for an hdfs:// path.

    Raises:
        ValueError: the path has another scheme, such as s3://.
    """
    text = str(path)
    if "://" in text and not text.startswith(_SCHEME):
        raise ValueError(f"{text}: only local paths and {_SCHEME} are supported; copy it with the tool of its storage")
    return text.startswith(_SCHEME)


def exists(path: str | Path) -> bool:
    """Return True if a path exists.

    Raises:
        ValueError: as for `copy`.
    """
    return _hdfs("-test", "-e", str(path)) == 0 if is_remote(path) else os.path.exists(_local(path))


def makedirs(name: str | Path, mode: int = 0o777, exist_ok: bool = False, **kwargs: Any) -> None:
    """Create a directory and its parents.

    Args:
        name: the directory; `~` of a local path is expanded.
        mode: permissions of a local directory, before the umask.
        exist_ok: an existing directory is no error.
        kwargs: none are supported.

    Raises:
        FileExistsError: the directory exists.
        ValueError: as for `copy`.
    """
    _refuse("makedirs", kwargs)
    if not is_remote(name):
        os.makedirs(_local(name), mode=mode, exist_ok=exist_ok)
        return
    if not exist_ok and exists(name):
        raise FileExistsError(f"{name} exists")
    _checked("-mkdir", "-p", str(name))


def copy(src: str | Path, dst: str | Path, **kwargs: Any) -> bool:
    """Copy a file or a directory; an existing file is replaced. Return True.

    Args:
        src: what to copy; `~` of a local path is expanded.
        dst: the new path, or an existing directory to copy into.
        kwargs: keywords of `shutil.copytree` for a directory, of `shutil.copy` for a file; local paths only.

    Raises:
        FileNotFoundError: `src` does not exist.
        ValueError: an hdfs:// path and no command `hdfs`, another scheme, or keywords with an hdfs:// path.
        OSError: the copy failed.
    """
    if is_remote(src) or is_remote(dst):
        _refuse("copy", kwargs)
        if is_remote(src) and is_remote(dst):
            _checked("-cp", "-f", str(src), str(dst))
        elif is_remote(src):
            _checked("-get", "-f", str(src), _local(dst))
        else:
            _checked("-put", "-f", _local(src), str(dst))
        return True
    source, target = _local(src), _local(dst)
    if os.path.isdir(source):
        inside = os.path.join(target, os.path.basename(os.path.normpath(source))) if os.path.isdir(target) else target
        shutil.copytree(source, inside, **{"dirs_exist_ok": True, **kwargs})
    else:
        shutil.copy(source, target, **kwargs)
    return True


def _local(path: str | Path) -> str:
    return os.path.expanduser(path)


def _refuse(function: str, kwargs: dict[str, Any]) -> None:
    if kwargs:
        raise ValueError(f"{function}: the keywords {', '.join(kwargs)} are not supported here; leave them out")


def _hdfs(*arguments: str) -> int:
    command = shutil.which("hdfs")
    if command is None:
        path = next(argument for argument in arguments if argument.startswith(_SCHEME))
        raise ValueError(f"{path}: the command hdfs is not installed here; install it, or give a local path")
    return subprocess.run([command, "dfs", *arguments], check=False).returncode


def _checked(*arguments: str) -> None:
    status = _hdfs(*arguments)
    if status:
        raise OSError(f"hdfs dfs {' '.join(arguments)} failed with the exit status {status}; see its message above")
