"""Detection of devices in a directory that replaces /dev."""

import pytest

from verl.utils import devices
from verl.utils.devices import count_devices, detect_device, dist_backend, torch_device


def machine(root, *nodes):
    (root / "dev").mkdir()
    for node in nodes:
        (root / "dev" / node).touch()
    return root


@pytest.fixture(autouse=True)
def no_visible_devices_variables(monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def installed(monkeypatch):
    """Pretends that a torch build and torch_npu are (not) installed."""

    def pretend(torch="2.13.0", torch_npu=False):
        monkeypatch.setattr(devices, "_torch_version", lambda: torch)
        monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: object() if torch_npu else None)

    return pretend


def test_auto_selects_a_usable_accelerator(tmp_path, installed):
    installed(torch="2.13.0+cu130")
    assert detect_device("auto", root=tmp_path) == "cpu"
    root = machine(tmp_path, "nvidia0", "nvidia1", "nvidiactl", "null")
    assert detect_device("auto", root=root) == detect_device("cuda", root=root) == "cuda"
    assert count_devices("cuda", root=root) == 2
    installed(torch="2.13.0+cpu")
    assert detect_device("auto", root=root) == "cpu"


def test_auto_detects_an_npu(tmp_path, installed):
    root = machine(tmp_path, "davinci0", "davinci7", "davinci_manager")
    installed(torch_npu=True)
    assert detect_device("auto", root=root) == "npu" and count_devices("npu", root=root) == 2
    installed(torch_npu=False)
    assert detect_device("auto", root=root) == "cpu"


@pytest.mark.parametrize(
    ("device", "nodes", "torch", "words"),
    [
        ("cuda", (), "2.13.0", "no NVIDIA device"),
        ("npu", (), "2.13.0", "no Ascend device"),
        ("cuda", ("nvidia0",), "2.13.0+cpu", "build for the CPU"),
        ("cuda", ("nvidia0",), None, "torch is not installed"),
        ("npu", ("davinci0",), "2.13.0", "torch_npu is not installed"),
    ],
)
def test_an_unusable_device_is_an_error_with_the_reason(tmp_path, installed, device, nodes, torch, words):
    installed(torch=torch)
    with pytest.raises(ValueError, match=rf"trainer.device={device}: .*{words}"):
        detect_device(device, root=machine(tmp_path, *nodes))


def test_hidden_devices_do_not_count(tmp_path, monkeypatch, installed):
    installed()
    root = machine(tmp_path, *(f"nvidia{i}" for i in range(8)))
    for visible, expected in (("0,3", 2), ("", 0), ("-1", 0), ("0,1,2,3,4,5,6,7,8,9", 8)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert count_devices("cuda", root=root) == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert detect_device("auto", root=root) == "cpu"


def test_an_unknown_device_is_an_error():
    with pytest.raises(ValueError, match=r"trainer\.device=tpu"):
        detect_device("tpu")
    with pytest.raises(ValueError, match="tpu"):
        dist_backend("tpu")


def test_each_device_has_its_collective_backend():
    assert [dist_backend(device) for device in ("cpu", "cuda", "npu")] == ["gloo", "nccl", "hccl"]


def test_torch_device_has_the_index():
    import torch

    assert torch_device("cpu") == torch.device("cpu")
    assert torch_device("cuda", 3) == torch.device("cuda", 3)
