import os
import subprocess
import sys

import pytest

from verl.utils import platform
from verl.utils.platform import (
    available_memory_bytes,
    choose_dtype,
    count_devices,
    cpu_features,
    detect_device,
    dist_backend,
)

AVX2 = "processor\t: 0\nmodel name\t: X\nflags\t\t: fpu avx2 fma\n\nprocessor\t: 1\nflags\t\t: fpu avx512_bf16\n"
AVX512 = "flags\t\t: fpu avx2 avx512f avx512_bf16\n"
AMX = "flags: fpu amx_bf16 amx_tile\n"
ARM = "processor : 0\nFeatures : fp asimd bf16\n"


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
        monkeypatch.setattr(platform, "_torch_version", lambda: torch)
        monkeypatch.setattr(platform.importlib.util, "find_spec", lambda name: object() if torch_npu else None)

    return pretend


def test_auto_takes_the_accelerator_that_is_there_and_usable(tmp_path, installed):
    installed(torch="2.13.0+cu130")
    assert detect_device("auto", root=tmp_path) == "cpu"
    root = machine(tmp_path, "nvidia0", "nvidia1", "nvidiactl", "null")
    assert detect_device("auto", root=root) == detect_device("cuda", root=root) == "cuda"
    assert count_devices("cuda", root=root) == 2
    installed(torch="2.13.0+cpu")
    assert detect_device("auto", root=root) == "cpu"


def test_auto_finds_an_npu(tmp_path, installed):
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
def test_a_device_that_cannot_be_used_says_why(tmp_path, installed, device, nodes, torch, words):
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


def test_an_unknown_device():
    with pytest.raises(ValueError, match=r"trainer\.device=tpu"):
        detect_device("tpu")
    with pytest.raises(ValueError, match="tpu"):
        dist_backend("tpu")


def test_backends():
    assert [dist_backend(device) for device in ("cpu", "cuda", "npu")] == ["gloo", "nccl", "hccl"]


def test_features_of_the_first_core():
    assert cpu_features(AVX2) == {"fpu", "avx2", "fma"}
    assert cpu_features(ARM) == {"fp", "asimd", "bf16"}
    assert cpu_features("nothing here") == frozenset()


@pytest.mark.parametrize(
    ("device", "requested", "cpuinfo", "name", "why"),
    [
        ("cpu", "auto", AVX2, "float32", "neither avx512_bf16 nor amx_bf16"),
        ("cpu", "auto", AVX512, "bfloat16", "has avx512_bf16"),
        ("cpu", "auto", AMX, "bfloat16", "has amx_bf16"),
        ("cpu", "auto", "", "float32", "neither"),
        ("cuda", "auto", AVX2, "bfloat16", "cuda"),
        ("npu", "auto", AVX2, "bfloat16", "npu"),
        ("cpu", "bf16", AVX2, "bfloat16", "as configured"),
        ("cuda", "fp32", AVX512, "float32", "as configured"),
        ("cuda", "float32", AVX512, "float32", "as configured"),
    ],
)
def test_the_dtype_and_why(device, requested, cpuinfo, name, why):
    choice = choose_dtype(device, requested, cpuinfo=cpuinfo)
    assert choice.name == name and why in choice.why


def test_another_dtype():
    with pytest.raises(ValueError, match="float16"):
        choose_dtype("cpu", "float16")


def write(root, **files):
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_memory_is_the_lesser_of_machine_and_container(tmp_path):
    assert available_memory_bytes(root=tmp_path) is None
    write(tmp_path, proc__meminfo="MemTotal:  9000 kB\nMemAvailable:    4000 kB\n")
    assert available_memory_bytes(root=tmp_path) == 4000 * 1024
    cgroup = {
        "sys__fs__cgroup__memory_dot_current": "3000000\n",
        "sys__fs__cgroup__memory_dot_stat": "anon 1\ninactive_file 500000\n",
    }
    write(tmp_path, **cgroup, sys__fs__cgroup__memory_dot_max="max\n")
    assert available_memory_bytes(root=tmp_path) == 4000 * 1024
    write(tmp_path, sys__fs__cgroup__memory_dot_max="5000000\n")
    assert available_memory_bytes(root=tmp_path) == 5000000 - 3000000 + 500000


def test_this_machine_has_memory():
    assert available_memory_bytes() > 1 << 20


def test_a_cpu_process_gets_an_allocator_that_keeps_what_is_freed(monkeypatch):
    for name in ("LD_PRELOAD", "MALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    given = platform.cpu_environment(3)
    assert (given["OMP_NUM_THREADS"], given["OMP_WAIT_POLICY"]) == ("3", "PASSIVE")
    library = given["LD_PRELOAD"]
    # It frees 256 MiB in blocks of 4, and is asked how much it holds for the next ones.
    code = (
        "import re, torch; kept = [torch.ones(1 << 20) for _ in range(64)]; kept.clear(); "
        "print(re.search(r'VmRSS:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    rss = {}
    for conf in (given["MALLOC_CONF"], "dirty_decay_ms:0"):
        environment = {**os.environ, **given, "MALLOC_CONF": conf}
        printed = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
        rss[conf] = int(printed) >> 10
    assert rss[given["MALLOC_CONF"]] - rss["dirty_decay_ms:0"] > 200

    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libother.so")
    monkeypatch.setenv("MALLOC_CONF", "dirty_decay_ms:0")
    both = platform.cpu_environment(3)
    assert (both["LD_PRELOAD"], both["MALLOC_CONF"]) == (f"{library}:/usr/lib/libother.so", "dirty_decay_ms:0")
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libtcmalloc_minimal.so.4")
    assert platform.cpu_environment(3) == platform.thread_environment(3)


def test_torch_devices():
    import torch

    assert platform.torch_device("cpu") == torch.device("cpu")
    assert platform.torch_device("cuda", 3) == torch.device("cuda", 3)
