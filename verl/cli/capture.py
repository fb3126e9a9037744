"""Run a shell script without its programs, to find the training command that it would start.

The script's own shell code runs: variables, conditions, functions, loops, `cd`, `source`. Programs do not run, except a
few that only read (`TOOLS`). Each program is recorded with its arguments and counts as successful. See guard.bash.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from verl.config.entry_points import ENTRY_POINTS, MAIN_PPO, EntryPoint

GUARD = Path(__file__).with_name("guard.bash")
# Programs that only read and print, with any arguments.
TOOLS = (
    *("basename", "cat", "cut", "dirname", "expr", "head", "id", "nproc", "readlink", "realpath", "seq", "tail"),
    *("tr", "uname", "wc"),
)
# Time limit of a script.
SECONDS = 20.0
# Environment variables of a program that are recorded.
VARIABLES = ("VLLM_ASCEND_ENABLE_NZ", "PYTORCH_NPU_ALLOC_CONF", "TASK_QUEUE_ENABLE", "RAY_ADDRESS")

# Programs of upstream verl that train no policy: a part of the module's name, and what to use.
_OTHER_MODULES = {
    "sft": "supervised fine-tuning is not supported; start from a model that was fine-tuned elsewhere",
    "main_generation": "use trainer.val_only=True, with trainer.validation_data_dir for the samples",
    "main_eval": "use trainer.val_only=True",
}
_USE_ENTRY_POINT = f"use one of {', '.join(ENTRY_POINTS)}"


class CaptureError(Exception):
    """A script starts no training command; the message gives the reason and what to do."""


@dataclass(frozen=True)
class Command:
    """A program that a script would run.

    Attributes:
        words: its name and arguments; of a training command only the overrides.
        folder: working directory.
        environment: the `VARIABLES` that are set.
        entry: the module of a training command.
    """

    words: tuple[str, ...]
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    entry: EntryPoint = MAIN_PPO


@dataclass(frozen=True)
class Capture:
    """Programs that a script would run.

    Attributes:
        trainings: training commands.
        others: all other programs, in order.
        output: stdout and stderr of the script.
    """

    trainings: tuple[Command, ...]
    others: tuple[Command, ...]
    output: str


def capture(script: Path, arguments: Sequence[str] = (), *, npu: bool = False, seconds: float = SECONDS) -> Capture:
    """Run a script without its programs.

    Args:
        arguments: arguments of the script.
        npu: answer to a script that tests whether torch_npu can be imported.
        seconds: time limit, after which the script is ended.

    Raises:
        CaptureError: bash is missing or too old, or the script ends without a training command.
    """
    bash = _bash()
    with tempfile.TemporaryDirectory(prefix="verl-check-") as folder:
        for tool in TOOLS:
            program = shutil.which(tool)
            if program:
                os.symlink(program, Path(folder) / tool)
        status, reported, output = _run(bash, folder, [str(script), *arguments], npu, seconds)
    commands = list(_commands(reported))
    trainings = tuple(
        replace(command, entry=found[0], words=tuple(found[1]))
        for command in commands
        if (found := training_command(command.words)) is not None
    )
    others = tuple(command for command in commands if training_command(command.words) is None)
    if not trainings:
        raise CaptureError(_no_training_error(script, status, others, output, seconds))
    return Capture(trainings, others, output)


def training_command(words: Sequence[str]) -> tuple[EntryPoint, list[str]] | None:
    """Return module and arguments of `python -m verl.trainer.main_ppo` or `verl train`; None for any other command.

    All modules in `verl.config.entry_points` are known. Words before these, such as a launcher, are ignored.
    """
    for i, word in enumerate(words):
        if word in ENTRY_POINTS and words[i - 1] == "-m" and i:
            return ENTRY_POINTS[word], list(words[i + 1 :])
        if word == "train" and i and Path(words[i - 1]).name == "verl":
            return MAIN_PPO, list(words[i + 1 :])
    return None


def _upstream_module(words: Sequence[str]) -> str | None:
    """Return the module of upstream verl that a command starts with `-m`; None for any other command."""
    for option, module in itertools.pairwise(words):
        if option == "-m" and module.startswith(("verl.", "recipe.")):
            return module
    return None


def _bash() -> str:
    bash = shutil.which("bash")
    if bash is None:
        raise CaptureError("bash is not installed, and scripts need it; give overrides (key=value) and no script")
    version = subprocess.run(
        [bash, "-c", "echo ${BASH_VERSINFO[0]}"], capture_output=True, text=True, check=True, env={}
    ).stdout
    if int(version) < 4:
        raise CaptureError(
            f"{bash} is version {version.strip()}: must be 4 or newer; put a newer bash on the PATH, or give overrides"
        )
    return bash


def _run(bash: str, tools: str, words: Sequence[str], npu: bool, seconds: float) -> tuple[int | None, bytes, str]:
    """Run bash with guard.bash, which blocks programs and reports each command instead.

    Returns:
        exit status (None at the time limit), reported commands, and output."""
    read, write = os.pipe()
    # Exported functions of the environment would replace programs.
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
    """Yield the reported commands in the order in which their reports ended.

    A report is the directory, the number of variables, the variables, and the words. It consists of parts, which a NUL
    byte ends; parts of several processes may be mixed. See `__verl_send` in guard.bash.
    """
    unfinished: dict[str, list[bytes]] = {}
    for part in reported.split(b"\0")[:-1]:
        match = re.match(rb"(\d+)([+we])", part)
        assert match is not None, part
        process, text = match[1].decode(), part[match.end() :]
        words = unfinished.setdefault(process, [b""])
        words[-1] += text
        if match[2] == b"w":
            words.append(b"")
        elif match[2] == b"e":
            folder, count, *rest = (word.decode(errors="surrogateescape") for word in unfinished.pop(process)[:-1])
            variables = dict(text.split("=", 1) for text in rest[: int(count)])
            yield Command(tuple(rest[int(count) :]), Path(folder), variables)


def _no_training_error(script: Path, status: int | None, others: Sequence[Command], output: str, seconds: float) -> str:
    modules = [module for command in others if (module := _upstream_module(command.words)) is not None]
    if modules:
        use = next((use for part, use in _OTHER_MODULES.items() if part in modules[-1]), _USE_ENTRY_POINT)
        return f"{script}: starts python3 -m {modules[-1]}, which is not a part of this package; {use}"
    end = f"was still running after {seconds:g} s" if status is None else f"ended with status {status}"
    # Lines with + are the trace of `set -x`.
    printed = [line for line in output.splitlines() if line.strip() and not line.startswith("+")]
    last = f"; its last line of output: {printed[-1].strip()}" if printed else ""
    unset = re.search(r": line \d+: (\w+): ", printed[-1]) if printed and status else None
    if unset is not None:
        return f"{script}: needs the environment variable {unset[1]}{last}; set it and check again"
    skipped = ", ".join(dict.fromkeys(Path(command.words[0]).name for command in others))
    why = f"; it may need the output of programs that were not run ({skipped})" if skipped else ""
    return (
        f"{script}: {end} without a training command (python3 -m {MAIN_PPO.module} or verl train){last}{why}; give "
        "overrides (key=value) and no script"
    )
