"""Addresses of this host's interfaces and of the Ray cluster that a run would join."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
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
    address = asked or environment.get("RAY_ADDRESS")
    if address:
        return None if address == "local" else address
    folder = environment.get("RAY_TMPDIR") or environment.get("TMPDIR") or str(root / "tmp")
    try:
        return Path(folder, "ray/ray_current_cluster").read_text(encoding="utf-8").strip() or None
    except OSError:
        return None
