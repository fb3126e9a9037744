"""The Ray cluster that a run starts for itself: on this host only, behind a token of its own, at normal priority."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import ray
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # compiled

# By default Ray starts its workers at nice 15, so that every other process of the host starves engines and ranks.
NICENESS = "RAY_worker_niceness"
_FOLDER = "verl-ray-"
_TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def _remove_leftovers() -> None:
    """Remove the folders of this user's runs that were killed (SIGKILL) and could not remove them."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*-*"):
        pid = folder.name.removeprefix(_FOLDER).partition("-")[0]
        with suppress(OSError):
            if pid.isdecimal() and not psutil.pid_exists(int(pid)) and folder.stat().st_uid == os.getuid():
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def local_cluster(options: dict[str, Any]) -> Iterator[None]:
    """Start a Ray cluster on this host and connect to it; end it with the block.

    A program that reaches Ray's sockets can run code. So all of them listen on the loopback interface, and each request
    needs a random token, which is in a file that only this user can read. Ray's own metrics are off, because their HTTP
    server needs no token. A token, a mode of authentication and a niceness in the environment have precedence.

    Args:
        options: arguments of `ray.init`.
    """
    _remove_leftovers()
    folder = Path(tempfile.mkdtemp(prefix=f"{_FOLDER}{os.getpid()}-"))
    environment = {NICENESS: os.environ.get(NICENESS, "0")}
    if not any(os.environ.get(name) for name in _TOKENS):
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32), encoding="ascii")
        environment[_TOKENS[1]] = str(token)
    # By default Ray would join a cluster of this host that another program has started meanwhile.
    options = {"_node_ip_address": "127.0.0.1", **options, "address": "local"}
    options["_system_config"] = {"enable_metrics_collection": False, **(options.get("_system_config") or {})}
    try:
        # Restores the environment, in which Ray also writes the mode of authentication.
        with mock.patch.dict(os.environ, environment):
            AuthenticationTokenLoader.instance().reset_cache()
            # Otherwise Ray replaces the loopback address by that of an interface, for hosts that join later.
            with mock.patch.object(ray_constants, "ENABLE_RAY_CLUSTER", False):
                ray.init(**options)
            try:
                yield
            finally:
                ray.shutdown()
    finally:
        AuthenticationTokenLoader.instance().reset_cache()
        shutil.rmtree(folder, ignore_errors=True)
