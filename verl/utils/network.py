"""Addresses: of this host's interfaces, and of the Ray cluster that a run would join."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

_SIOCGIFADDR = 0x8915


def interface_of(address: str) -> str | None:
    """The network interface with this IPv4 address, None where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def ray_cluster(environment: Mapping[str, str], *, root: Path = Path("/")) -> str | None:
    """Where `ray.init` would join one: `RAY_ADDRESS`, or the cluster that was started last on this machine."""
    address = environment.get("RAY_ADDRESS")
    if address:
        return None if address == "local" else address
    folder = environment.get("RAY_TMPDIR") or environment.get("TMPDIR") or str(root / "tmp")
    try:
        return Path(folder, "ray/ray_current_cluster").read_text(encoding="utf-8").strip() or None
    except OSError:
        return None
