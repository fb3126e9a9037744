"""Devices of this machine: detection, visibility, collective backend. Imports no torch at import time."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from verl.utils.host import cpu_cores

if TYPE_CHECKING:
    import torch

DEVICES = ("cpu", "cuda", "npu")
_BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
VISIBLE_VARIABLES = {"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}


def detect_device(requested: str = "auto", *, root: Path = Path("/")) -> str:
    """Return `cpu`, `cuda` or `npu`: the requested device or, for `auto`, the accelerator if there is one.

    Args:
        requested: `auto` or a device.
        root: parent directory of `dev`.

    Raises:
        ValueError: unknown device, or the machine or the installation lacks it.
    """
    if requested == "auto":
        return next((device for device in ("cuda", "npu") if unavailable_reason(device, root=root) is None), "cpu")
    if requested not in DEVICES:
        raise ValueError(f"trainer.device={requested} is unknown: use auto, {', '.join(DEVICES)}")
    reason = unavailable_reason(requested, root=root)
    if reason is not None:
        raise ValueError(f"trainer.device={requested}: {reason}; use auto or cpu, or install the missing part")
    return requested


def unavailable_reason(device: str, *, root: Path = Path("/")) -> str | None:
    """Return the reason why `device` cannot be used here, or None if it can."""
    if device == "cpu":
        return None
    if count_devices(device, root=root) == 0:
        name, node = ("NVIDIA", "nvidia0") if device == "cuda" else ("Ascend", "davinci0")
        return f"this machine has no {name} device (no {root / 'dev' / node}, or its visible-devices variable is empty)"
    if device == "npu":
        return None if importlib.util.find_spec("torch_npu") else "the package torch_npu is not installed"
    version = _torch_version()
    if version is None:
        return "torch is not installed"
    return f"the installed torch {version} is a build for the CPU" if version.endswith("+cpu") else None


def count_devices(device: str, *, root: Path = Path("/")) -> int:
    """Return the number of visible devices of a kind; for `cpu` the number of cores that this process may use."""
    if device == "cpu":
        return cpu_cores()
    pattern = {"cuda": r"nvidia\d+", "npu": r"davinci\d+"}[device]
    folder = root / "dev"
    nodes = [entry for entry in os.listdir(folder) if re.fullmatch(pattern, entry)] if folder.is_dir() else []
    visible = visible_devices(device)
    return len(nodes) if visible is None else min(len(nodes), len(visible))


def visible_devices(device: str) -> list[str] | None:
    """Return the ids of the accelerators that this process is restricted to; None if it is not restricted."""
    visible = os.environ.get(VISIBLE_VARIABLES[device])
    return None if visible is None else [part.strip() for part in visible.split(",") if part.strip() not in ("", "-1")]


def devices_environment(device: str, ids: Iterable[str] | None) -> dict[str, str]:
    """Return the environment of a Ray worker that sees these accelerators, reserved or not; None means all."""
    shown = {} if ids is None else {VISIBLE_VARIABLES[device]: ",".join(ids)}
    return {f"RAY_EXPERIMENTAL_NOSET_{VISIBLE_VARIABLES[device]}": "1", **shown}


def dist_backend(device: str) -> str:
    """Return the torch.distributed backend of a device."""
    if device not in _BACKENDS:
        raise ValueError(f"device={device!r} is unknown: use one of {', '.join(_BACKENDS)}")
    return _BACKENDS[device]


def torch_device(device: str, index: int | None = None) -> torch.device:
    """Return the `torch.device` of a device name. Imports torch, and torch_npu for an NPU."""
    import torch

    if device == "npu":
        import torch_npu  # noqa: F401  (registers the device)
    return torch.device(device) if device == "cpu" or index is None else torch.device(device, index)


def _torch_version() -> str | None:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
