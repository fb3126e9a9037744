"""Addresses of this host's interfaces and of the Ray cluster that a run would join."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

_SIOCGIFADDR = 0x8915


def interface_of(address: str) -> str | None:
    """Return the network interface with this IPv4 address, or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(reply[20:24]) == address:
                return name
    return None


def choose_gloo_interface(address: str) -> None:
    """Make gloo use the interface with this host's `address`, unless `GLOO_SOCKET_IFNAME` is set.

    By default gloo uses the address to which the host name resolves, which other hosts often cannot reach.
    """
    if (interface := interface_of(address)) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def ray_cluster(environment: Mapping[str, str], *, asked: str | None = None, root: Path = Path("/")) -> str | None:
    """Return the address of the cluster that `ray.init(address=asked)` would join, or None if it would start one.

    `RAY_ADDRESS` and the most recently started cluster of this host count.
    """
    return _ray_cluster(environment, asked, root)[0]


def _ray_cluster(environment: Mapping[str, str], asked: str | None, root: Path) -> tuple[str | None, str]:
    """Return the address of `ray_cluster`, and the setting that holds it."""
    address = asked or environment.get("RAY_ADDRESS")
    if address and address != "auto":
        source = f"ray_kwargs.ray_init.address={asked}" if asked else f"RAY_ADDRESS={address}"
        return None if address == "local" else address, source
    folder = environment.get("RAY_TMPDIR") or environment.get("TMPDIR") or str(root / "tmp")
    path = Path(folder, "ray/ray_current_cluster")
    try:
        found = path.read_text(encoding="utf-8").strip() or None
    except OSError:
        found = None
    return found or address or None, f"{path} (written by `ray start`)"


def require_ray_cluster(
    environment: Mapping[str, str], *, asked: str | None = None, root: Path = Path("/"), seconds: float = 10.0
) -> None:
    """Check that the cluster of `ray_cluster`, if there is one, accepts connections; Ray itself waits for minutes.

    Raises:
        ConnectionError: it does not, for `seconds`; names the setting that holds the address.
    """
    address, source = _ray_cluster(environment, asked, root)
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=max(0.1, end - time.monotonic())).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() + 1 > end:
                raise ConnectionError(
                    f"no Ray cluster answers at {address} ({error}), which {source} names; start the cluster, or "
                    "remove this setting to start Ray with the run"
                ) from error
        time.sleep(1)
