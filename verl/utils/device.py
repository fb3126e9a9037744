"""The device of this process, under upstream verl's names; `verl.utils.devices` has the implementation."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from verl.utils import devices


def get_device_name() -> str:
    """Return `cuda`, `npu` or `cpu`: the accelerator of this machine if there is one."""
    return devices.detect_device()


def get_torch_device() -> ModuleType:
    """Return torch's module of the device: `torch.cuda`, `torch.npu` or `torch.cpu`."""
    name = get_device_name()
    if name == "npu":
        importlib.import_module("torch_npu")  # adds torch.npu
    module: ModuleType = getattr(importlib.import_module("torch"), name)
    return module


def get_device_id() -> int:
    """Return the index of the current device; 0 on a CPU."""
    return 0 if get_device_name() == "cpu" else int(get_torch_device().current_device())


def get_nccl_backend() -> str:
    """Return the backend of torch.distributed: nccl, hccl, or gloo on a CPU."""
    return devices.dist_backend(get_device_name())


def get_visible_devices_keyword() -> str:
    """Return the environment variable that restricts the devices; that of CUDA on a CPU."""
    return devices.VISIBLE_VARIABLES.get(get_device_name(), devices.VISIBLE_VARIABLES["cuda"])


def __getattr__(name: str) -> Any:
    # Computed on access, because `verl.utils.devices` looks at the machine.
    if name in ("is_cuda_available", "is_npu_available"):
        return devices.unavailable_reason(name.split("_")[1]) is None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
