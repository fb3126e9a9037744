"""`verl doctor`: problems of this machine and its installed packages, and a block for a bug report.

The output contains no secrets: environment variables are shown by name, and only a few known ones with their value. The
value of a variable with the name of a secret is replaced everywhere in the output.
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
from verl.utils.byte_size import format_bytes

if TYPE_CHECKING:
    from verl.cli.doctor_checks import Finding
    from verl.cli.doctor_facts import Facts

# Variables that affect a run and hold nothing private.
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
# Variables with these prefixes are shown by name.
_NAMED = ("ASCEND_", "CUDA_", "GLOO_", "HCCL_", "HF_", "NCCL_", "NPU_", "OMP_", "PYTORCH_", "RAY_", "TORCH_", "VLLM_")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH|COOKIE|PRIVATE", re.IGNORECASE)
_USER_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")
# Shorter values would also replace ordinary words.
_SHORTEST_SECRET = 6
_REDACTED = "***"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `verl doctor` to the parser."""
    parser.add_argument("--json", action="store_true", help="print findings and facts as one JSON object")


def run(options: argparse.Namespace) -> int:
    """Print the findings; return 1 if one of them makes a run fail, else 0."""
    try:
        from verl.cli.doctor_checks import findings
        from verl.cli.doctor_facts import gather
    except ModuleNotFoundError as error:
        sys.stderr.write(f"verl doctor: the package {error.name} is not installed; run `pip install {error.name}`\n")
        return 1
    facts = gather(os.environ)
    found = findings(facts)
    text = as_json(facts, found) if options.json else as_text(facts, found)
    sys.stdout.write(text + "\n")
    return 1 if any(finding.level == "error" for finding in found) else 0


def as_text(facts: Facts, found: list[Finding]) -> str:
    """Return the findings, followed by the block for a bug report."""
    lines = [f"verl {__version__}: {_summary(found)}", ""]
    lines += [f"  {finding.level}: {finding.text}" for finding in found]
    lines += [""] if found else []
    block = [*_rows(facts), *(_row(finding.level, finding.text) for finding in found)]
    lines += ["For a bug report, copy the following lines:", "", "```text", *block, "```"]
    return redact("\n".join(lines), facts.environment)


def as_json(facts: Facts, found: list[Finding]) -> str:
    """Return `{"verl": version, "findings": [{level, topic, text}], "facts": {...}}` without secrets."""
    values: dict[str, Any] = dataclasses.asdict(facts)
    values["environment"] = shown_environment(facts.environment)
    content = {"verl": __version__, "findings": [dataclasses.asdict(finding) for finding in found], "facts": values}
    return json.dumps(_redact_values(content, facts.environment), indent=2)


def _redact_values(value: Any, environment: Mapping[str, str]) -> Any:
    """Redact each text of a JSON value. Behind `json.dumps`, secrets with escaped characters would not be found."""
    if isinstance(value, str):
        return redact(value, environment)
    if isinstance(value, Mapping):
        return {key: _redact_values(each, environment) for key, each in value.items()}
    return [_redact_values(each, environment) for each in value] if isinstance(value, list | tuple) else value


def redact(text: str, environment: Mapping[str, str]) -> str:
    """Replace the values of secret variables, users and passwords in URLs, and the home directory in `text`."""
    secrets = {value for name, value in environment.items() if _SECRET.search(name) and name not in _SHOWN}
    # The longest first, because a secret can be a part of another one.
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, _REDACTED)
    home = environment.get("HOME", "").rstrip("/")
    text = re.sub(rf"{re.escape(home)}(?=/|$)", "~", text) if home else text
    return _USER_IN_URL.sub(f"{_REDACTED}@", text)


def shown_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that affect a run: known ones with their value, other ones with `(set)`."""
    named = {name: "(set)" for name in environment if name.startswith(_NAMED)}
    known = {name: environment[name] for name in _SHOWN if name in environment}
    return dict(sorted((named | known).items()))


def _summary(found: list[Finding]) -> str:
    errors = sum(finding.level == "error" for finding in found)
    warnings = len(found) - errors
    if not found:
        return "no problems found"
    return f"{errors} error{'' if errors == 1 else 's'}, {warnings} warning{'' if warnings == 1 else 's'}"


def _rows(facts: Facts) -> Iterable[str]:
    yield _row("verl", __version__)
    yield _row("python", f"{facts.python} on {facts.system}")
    yield _row("packages", ", ".join(f"{name} {version or '-'}" for name, version in sorted(facts.packages.items())))
    yield _row("device", facts.device + "".join(f", {count} {kind}" for kind, count in facts.accelerators.items()))
    yield _row("vLLM detects", facts.vllm_platform or "-")
    if facts.device == "npu" or facts.cann or facts.driver:
        yield _row("CANN, driver", f"{facts.cann or '-'}, {facts.driver or '-'}")
    yield _row("dtype", facts.dtype)
    yield _row("CPU", f"{facts.cores} cores, {' '.join(facts.cpu_flags) or 'no relevant vector instructions'}")
    yield _row("MXFP8 on a CPU", f"kernels {_works(facts.kernels)}")
    yield _row("memory", f"{_size(facts.memory_bytes)} free")
    yield _row("/dev/shm", f"{_size(facts.shm_bytes)} free of {_size(facts.shm_size_bytes)}")
    yield _row("open files", " of at most ".join("any" if limit < 0 else str(limit) for limit in facts.open_files))
    yield _row("Ray", _ray(facts))
    for name, value in shown_environment(facts.environment).items():
        yield _row("environment", f"{name}={value}")


def _row(label: str, value: str) -> str:
    return textwrap.fill(
        f"{label:<15} {value}", 110, subsequent_indent=" " * 16, break_long_words=False, break_on_hyphens=False
    )


def _ray(facts: Facts) -> str:
    answers = {None: "", True: " (reachable)", False: " (not reachable)"}[facts.ray_answers]
    cluster = "starts a new cluster" if facts.ray_cluster is None else f"joins {facts.ray_cluster}{answers}"
    return f"{cluster}, {_size(facts.temp_bytes)} free on its disk"


def _works(problem: str | None) -> str:
    return "work" if problem is None else "do not work"


def _size(nbytes: int | None) -> str:
    return "?" if nbytes is None else format_bytes(nbytes)
