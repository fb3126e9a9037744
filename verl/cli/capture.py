"""Runs a shell script without its programs, to learn which training command it would have started.

The script's own shell code runs: variables, conditions, functions, loops, `cd`, `source`. Programs do not, but for a
few that only look (`TOOLS`); each is noted with its arguments, and counts as done. See guard.bash.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

GUARD = Path(__file__).with_name("guard.bash")
# Programs that read, print and do nothing else, whatever their arguments.
TOOLS = ("basename", "cat", "cut", "dirname", "expr", "head", "id", "nproc", "readlink", "realpath", "seq", "tail")
TOOLS += ("tr", "uname", "wc")
SECONDS = 20.0
# Environment variables that a program would have seen and that are kept.
VARIABLES = ("VLLM_ASCEND_ENABLE_NZ", "PYTORCH_NPU_ALLOC_CONF", "TASK_QUEUE_ENABLE", "RAY_ADDRESS")
_MODULE = "verl.trainer.main_ppo"


class CaptureError(Exception):
    """A script from which no training command comes; the message says why and what to do."""


@dataclass(frozen=True)
class Command:
    """A program that a script would have run: its words, its directory, and those of `VARIABLES` that were set."""

    words: tuple[str, ...]
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Capture:
    """What a script would have run.

    Attributes:
        trainings: arguments of each training command, and its directory.
        others: every other program, in order.
        output: what the script printed.
    """

    trainings: tuple[Command, ...]
    others: tuple[Command, ...]
    output: str


def capture(script: Path, arguments: Sequence[str] = (), *, npu: bool = False, seconds: float = SECONDS) -> Capture:
    """Run a script without its programs.

    Args:
        arguments: the script's.
        npu: what a script learns that asks whether torch_npu can be imported.
        seconds: after which a script that waits for something is ended.

    Raises:
        CaptureError: no bash, or the script ends without a training command.
    """
    bash = _bash()
    with tempfile.TemporaryDirectory(prefix="verl-check-") as folder:
        for tool in TOOLS:
            place = shutil.which(tool)
            if place:
                os.symlink(place, Path(folder) / tool)
        status, reported, output = _run(bash, folder, [str(script), *arguments], npu, seconds)
    commands = list(_commands(reported))
    trainings = tuple(
        replace(command, words=tuple(overrides))
        for command in commands
        if (overrides := training_arguments(command.words)) is not None
    )
    others = tuple(command for command in commands if training_arguments(command.words) is None)
    if not trainings:
        raise CaptureError(_nothing(script, status, others, output, seconds))
    return Capture(trainings, others, output)


def training_arguments(words: Sequence[str]) -> list[str] | None:
    """What follows `python -m verl.trainer.main_ppo` or `verl train`, behind any launcher; None for another command."""
    for i, word in enumerate(words):
        if word == _MODULE and words[i - 1] == "-m" and i:
            return list(words[i + 1 :])
        if word == "train" and i and Path(words[i - 1]).name == "verl":
            return list(words[i + 1 :])
    return None


def _bash() -> str:
    bash = shutil.which("bash")
    if bash is None:
        raise CaptureError("bash is not installed, which runs the script; give the overrides themselves")
    version = subprocess.run(
        [bash, "-c", "echo ${BASH_VERSINFO[0]}"], capture_output=True, text=True, check=True, env={}
    ).stdout
    if int(version) < 4:
        raise CaptureError(f"{bash} is version {version.strip()}; put bash 4 or newer on the PATH, or give overrides")
    return bash


def _run(bash: str, tools: str, words: Sequence[str], npu: bool, seconds: float) -> tuple[int | None, bytes, str]:
    """Exit status (None where time ran out), reports and output of a guarded bash."""
    read, write = os.pipe()
    # Functions that the environment exports would stand for programs.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BASH_FUNC_")}
    environment = kept | {
        "BASH_ENV": str(GUARD),
        "PATH": tools,
        "VERL_CHECK_BASH": bash,
        "VERL_CHECK_FD": str(write),
        "VERL_CHECK_GUARD": str(GUARD),
        "VERL_CHECK_NPU": "1" if npu else "",
        "VERL_CHECK_TOOLS": tools,
        "VERL_CHECK_VARIABLES": " ".join(VARIABLES),
    }
    with open(read, "rb") as reports:
        received: list[bytes] = []
        reader = threading.Thread(target=lambda: received.append(reports.read()))
        reader.start()
        with subprocess.Popen(
            [bash, *words],
            env=environment,
            pass_fds=[write],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process:
            os.close(write)
            try:
                output, _ = process.communicate(timeout=seconds)
                status: int | None = process.returncode
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                output, _ = process.communicate()
                status = None
        reader.join()
    return status, b"".join(received), output.decode(errors="replace")


def _commands(reported: bytes) -> Iterator[Command]:
    """Reports are the directory, variables and words, the last two behind their number; NUL ends each part."""
    parts = iter(reported.decode(errors="surrogateescape").split("\0")[:-1])

    def several() -> list[str]:
        return [next(parts) for _ in range(int(next(parts)))]

    for folder in parts:
        variables = dict(text.split("=", 1) for text in several())
        yield Command(tuple(several()), Path(folder), variables)


def _nothing(script: Path, status: int | None, others: Sequence[Command], output: str, seconds: float) -> str:
    end = f"was still waiting after {seconds:g} s" if status is None else f"ended with status {status}"
    printed = [line for line in output.splitlines() if line.strip() and not line.startswith("+")]  # + is `set -x`
    last = f"; the last it printed: {printed[-1].strip()}" if printed else ""
    unrun = ", ".join(dict.fromkeys(Path(command.words[0]).name for command in others))
    why = f"; it may need what a program prints that was not run ({unrun})" if unrun else ""
    return (
        f"{script}: {end} without a training command (python3 -m {_MODULE} or verl train){last}{why}: give the "
        "overrides themselves"
    )
