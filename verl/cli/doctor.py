"""`verl doctor`: what is wrong with this machine and what is installed on it, and a block for a bug report.

Nothing that is shown is secret: variables are shown by name, a few known ones with their value, and whatever a variable
holds that is named like a secret is blotted out of everything else.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from verl import __version__

if TYPE_CHECKING:
    from verl.cli.doctor_checks import Finding
    from verl.cli.doctor_facts import Facts

# Variables that steer a run and hold nothing private.
_SHOWN = (
    "ASCEND_HOME_PATH",
    "ASCEND_LAUNCH_BLOCKING",
    "ASCEND_RT_VISIBLE_DEVICES",
    "ASCEND_TOOLKIT_HOME",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "GLOO_SOCKET_IFNAME",
    "HCCL_BUFFSIZE",
    "HCCL_CONNECT_TIMEOUT",
    "HCCL_EXEC_TIMEOUT",
    "HCCL_HOST_SOCKET_PORT_RANGE",
    "HCCL_NPU_SOCKET_PORT_RANGE",
    "HCCL_SOCKET_IFNAME",
    "HF_HUB_OFFLINE",
    "LD_PRELOAD",
    "MALLOC_CONF",
    "NCCL_DEBUG",
    "NCCL_SOCKET_IFNAME",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_NPU_ALLOC_CONF",
    "RAY_TMPDIR",
    "SOC_VERSION",
    "TASK_QUEUE_ENABLE",
    "VLLM_ASCEND_ENABLE_NZ",
    "VLLM_ASCEND_TASK_QUEUE_ENABLE",
    "VLLM_LOGGING_LEVEL",
    "VLLM_PLUGINS",
    "VLLM_TARGET_DEVICE",
    "VLLM_WORKER_MULTIPROC_METHOD",
)
_NAMED = ("ASCEND_", "CUDA_", "GLOO_", "HCCL_", "HF_", "NCCL_", "NPU_", "OMP_", "PYTORCH_", "RAY_", "TORCH_", "VLLM_")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH|COOKIE|PRIVATE", re.IGNORECASE)
_USER_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")
# A shorter one would blot out ordinary words.
_SHORTEST_SECRET = 6
_BLOT = "***"
_WHOLE_WORDS = {"break_long_words": False, "break_on_hyphens": False}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `verl doctor`."""
    parser.add_argument("--json", action="store_true", help="write findings and facts as JSON")


def run(options: argparse.Namespace) -> int:
    """Look, and print; 1 where something will make a run fail, 0 otherwise."""
    try:
        from verl.cli.doctor_checks import findings
        from verl.cli.doctor_facts import gather
    except ModuleNotFoundError as error:
        sys.stderr.write(f"verl doctor: the package {error.name} is not installed; run pip install {error.name}\n")
        return 1
    facts = gather(os.environ)
    found = findings(facts)
    text = as_json(facts, found) if options.json else as_text(facts, found)
    sys.stdout.write(text + "\n")
    return 1 if any(finding.level == "error" for finding in found) else 0


def as_text(facts: Facts, found: list[Finding]) -> str:
    """Findings for the reader, then the block for a bug report."""
    lines = [f"verl {__version__}: {_summary(found)}", ""]
    lines += [f"  {finding.level}: {finding.text}" for finding in found]
    lines += [""] if found else []
    block = [*_rows(facts), *(_row(finding.level, finding.text) for finding in found)]
    lines += ["For a bug report, from here on:", "", "```text", *block, "```"]
    return redact("\n".join(lines), facts.environment)


def as_json(facts: Facts, found: list[Finding]) -> str:
    """`{"verl": version, "findings": [{level, topic, text}], "facts": {...}}`, without secrets."""
    values: dict[str, Any] = dataclasses.asdict(facts)
    values["environment"] = shown_environment(facts.environment)
    whole = {"verl": __version__, "findings": [dataclasses.asdict(finding) for finding in found], "facts": values}
    return json.dumps(_redacted(whole, facts.environment), indent=2)


def _redacted(value: Any, environment: Mapping[str, str]) -> Any:
    """Each text by itself: a secret that JSON would escape is found too."""
    if isinstance(value, str):
        return redact(value, environment)
    if isinstance(value, Mapping):
        return {key: _redacted(each, environment) for key, each in value.items()}
    return [_redacted(each, environment) for each in value] if isinstance(value, list | tuple) else value


def redact(text: str, environment: Mapping[str, str]) -> str:
    """`text` without what secrets of the environment hold, users and passwords in URLs, and the home directory."""
    secrets = {value for name, value in environment.items() if _SECRET.search(name) and name not in _SHOWN}
    # The longest first: one may be a part of another.
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, _BLOT)
    home = environment.get("HOME", "").rstrip("/")
    text = re.sub(rf"{re.escape(home)}(?=/|$)", "~", text) if home else text
    return _USER_IN_URL.sub(f"{_BLOT}@", text)


def shown_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that steer a run: the known ones with their values, others of their kind with `(set)`."""
    named = {name: "(set)" for name in environment if name.startswith(_NAMED)}
    known = {name: environment[name] for name in _SHOWN if name in environment}
    return dict(sorted((named | known).items()))


def _summary(found: list[Finding]) -> str:
    errors = sum(finding.level == "error" for finding in found)
    warnings = len(found) - errors
    if not found:
        return "nothing was found that hurts"
    return f"{errors} error{'' if errors == 1 else 's'}, {warnings} warning{'' if warnings == 1 else 's'}"


def _rows(facts: Facts) -> Iterable[str]:
    yield _row("verl", __version__)
    yield _row("python", f"{facts.python} on {facts.system}")
    yield _row("packages", ", ".join(f"{name} {version or '-'}" for name, version in sorted(facts.packages.items())))
    yield _row("device", facts.device + "".join(f", {count} {kind}" for kind, count in facts.accelerators.items()))
    yield _row("vLLM sees", facts.vllm_platform or "-")
    if facts.device == "npu" or facts.cann or facts.driver:
        yield _row("CANN, driver", f"{facts.cann or '-'}, {facts.driver or '-'}")
    yield _row("dtype", facts.dtype)
    yield _row("CPU", f"{facts.cores} cores, {' '.join(facts.cpu_flags) or 'no vector instructions that matter'}")
    yield _row("MXFP8 on a CPU", f"kernels {_works(facts.kernels)}")
    yield _row("memory", f"{_gib(facts.memory_bytes)} free")
    yield _row("/dev/shm", f"{_gib(facts.shm_bytes)} free of {_gib(facts.shm_size_bytes)}")
    yield _row("open files", " of at most ".join("any" if limit < 0 else str(limit) for limit in facts.open_files))
    yield _row("Ray", _ray(facts))
    for name, value in shown_environment(facts.environment).items():
        yield _row("environment", f"{name}={value}")


def _row(label: str, value: str) -> str:
    return textwrap.fill(f"{label:<15} {value}", 110, subsequent_indent=" " * 16, **_WHOLE_WORDS)


def _ray(facts: Facts) -> str:
    answers = {None: "", True: " (answers)", False: " (does not answer)"}[facts.ray_answers]
    cluster = "starts its own" if facts.ray_cluster is None else f"joins {facts.ray_cluster}{answers}"
    return f"{cluster}, {_gib(facts.temp_bytes)} free on its disk"


def _works(why_not: str | None) -> str:
    return "work" if why_not is None else "do not work"


def _gib(nbytes: int | None) -> str:
    return "?" if nbytes is None else f"{nbytes / 2**30:.1f} GiB"
