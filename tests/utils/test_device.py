"""The device of this process under upstream verl's names: on this machine, and on machines with an accelerator."""

import sys
from types import ModuleType

import pytest
import torch

from verl.utils import device, devices
from verl.utils.device import (
    get_device_id,
    get_device_name,
    get_nccl_backend,
    get_torch_device,
    get_visible_devices_keyword,
)


def found_by_torch():
    """The device that torch itself finds."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.skipif(devices.count_devices("npu") > 0, reason="torch_npu would have to be imported")
def test_the_device_of_this_machine_is_the_one_that_torch_finds():
    name = found_by_torch()
    assert get_device_name() == name
    assert get_torch_device() is getattr(torch, name)
    assert get_torch_device().is_available()
    assert get_device_id() == (torch.cuda.current_device() if name == "cuda" else 0)
    assert device.is_cuda_available is (name == "cuda")
    assert device.is_npu_available is False


class Accelerator(ModuleType):
    """torch's module of an accelerator whose device 2 is the current one."""

    @staticmethod
    def current_device():
        return 2


@pytest.fixture(params=["cuda", "npu"])
def machine(request, monkeypatch):
    """A machine with this accelerator and its packages; return the device, and torch's module of it."""
    name = request.param
    module = Accelerator(f"torch.{name}")
    reasons = {"cpu": None, "cuda": "no device", "npu": "no device"} | {name: None}
    monkeypatch.setattr(devices, "unavailable_reason", lambda kind, root=None: reasons[kind])
    monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
    monkeypatch.setitem(sys.modules, f"torch.{name}", module)
    monkeypatch.setattr(torch, name, module, raising=False)
    return name, module


def test_an_accelerator_is_found(machine):
    name, module = machine
    assert get_device_name() == name
    assert get_torch_device() is module and get_device_id() == 2
    assert get_nccl_backend() == {"cuda": "nccl", "npu": "hccl"}[name]
    variable = {"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}[name]
    assert get_visible_devices_keyword() == variable
    assert (device.is_cuda_available, device.is_npu_available) == (name == "cuda", name == "npu")


def test_a_cpu_has_one_device(monkeypatch):
    monkeypatch.setattr(devices, "unavailable_reason", lambda kind, root=None: None if kind == "cpu" else "no device")
    assert (get_device_name(), get_device_id(), get_nccl_backend()) == ("cpu", 0, "gloo")
    assert get_torch_device() is torch.cpu
    assert get_visible_devices_keyword() == "CUDA_VISIBLE_DEVICES"


def test_names_are_imported_as_in_upstream_verl():
    scope = {}
    exec("from verl.utils.device import get_device_name, is_cuda_available, is_npu_available", scope)
    assert type(scope["is_cuda_available"]) is type(scope["is_npu_available"]) is bool
    with pytest.raises(AttributeError, match="has no attribute 'is_tpu_available'"):
        _ = device.is_tpu_available
