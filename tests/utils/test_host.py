"""Facts about the host, read from files that the tests write, and the environment of CPU processes."""

import os
import subprocess
import sys

import pytest

from verl.utils.host import available_memory_bytes, cpu_environment, cpu_features, thread_environment

AVX2 = "processor\t: 0\nmodel name\t: X\nflags\t\t: fpu avx2 fma\n\nprocessor\t: 1\nflags\t\t: fpu avx512_bf16\n"
ARM = "processor : 0\nFeatures : fp asimd bf16\n"


def test_features_are_those_of_the_first_core():
    assert cpu_features(AVX2) == {"fpu", "avx2", "fma"}
    assert cpu_features(ARM) == {"fp", "asimd", "bf16"}
    assert cpu_features("nothing here") == frozenset()


def write(root, **files):
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_available_memory_is_the_minimum_of_machine_and_container(tmp_path):
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


def test_available_memory_of_this_machine_is_positive():
    assert available_memory_bytes() > 1 << 20


@pytest.mark.slow
def test_cpu_environment_preloads_an_allocator_that_keeps_freed_memory(monkeypatch):
    for name in ("LD_PRELOAD", "MALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    given = cpu_environment(3)
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
    both = cpu_environment(3)
    assert (both["LD_PRELOAD"], both["MALLOC_CONF"]) == (f"{library}:/usr/lib/libother.so", "dirty_decay_ms:0")
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libtcmalloc_minimal.so.4")
    assert cpu_environment(3) == thread_environment(3)
