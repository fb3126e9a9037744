"""`verl check`: everything that can be known about a run without starting it.

Imports no torch, Ray or vLLM, but for what the modules in `actor_rollout_ref.model.external_lib` import.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from verl.cli import check_output
from verl.cli.capture import SECONDS, Capture, CaptureError, Command, capture
from verl.config.errors import ConfigError
from verl.preflight.findings import Findings
from verl.preflight.plan import Plan
from verl.preflight.target import HARDWARE, Hardware, Scope

_DESCRIPTION = f"""\
Checks a training script, or the overrides of a run, without starting anything: keys and values, the model (config.json
is enough), the data row by row, prompt lengths, batches, parallel sizes, memory and weight updates. Each problem comes
with what to do.

Of a script, the shell's own commands run (variables, conditions, functions, cd, source). Programs do not: not the
training command, whose arguments are what is checked, and not what prepares models and data; each counts as done, and
prints nothing. Nothing is written, but that a whole block redirected into a new file leaves it empty. A script that
waits for something is ended after {SECONDS:g} s. Overrides behind the script are its arguments, as where it is run.
"""
_EPILOG = """\
exit status:
  0  no error    1  errors    2  there is nothing to check: wrong usage, or no training command in the script

examples:
  verl check examples/quickstart/run.sh --without-files
  verl check examples/ascend950/run.sh --device npu:ascend950 --without-files --bandwidth 5.3
  verl check train.sh trainer.n_gpus_per_node=16 --json
  verl check data.train_files=train.parquet data.val_files=test.parquet actor_rollout_ref.model.path=model
"""
_ABSENT = "files are missing: --without-files judges what can be judged without them"
_PREPARE = (
    "files are missing, and the script's other programs were not run: if they make these files, run them first, or use "
    "--without-files"
)


@dataclass(frozen=True)
class Run:
    """One training command and what was found.

    Attributes:
        overrides: its arguments.
        plan: None where errors leave none.
    """

    overrides: tuple[str, ...]
    plan: Plan | None
    found: Findings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments, description and examples."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument(
        "target", nargs="+", metavar="SCRIPT_OR_OVERRIDES", help="a shell script and its arguments, or key=value ..."
    )
    parser.add_argument(
        "--device",
        choices=HARDWARE,
        metavar="DEVICE",
        help=f"plan for hardware that is not here: {', '.join(HARDWARE)}",
    )
    parser.add_argument("--nodes", type=int, metavar="N", help="hosts that --device is about")
    parser.add_argument(
        "--without-files",
        action="store_true",
        help="models and data may be elsewhere: what is not here is a warning, and public models are known by name",
    )
    parser.add_argument(
        "--bandwidth",
        type=float,
        metavar="GB/s",
        help="say how long a weight update takes at so many 10^9 bytes/s",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Check and print; the exit status."""
    try:
        scope = _scope(options)
        captured = _commands(options.target, scope.hardware)
    except (CaptureError, ValueError) as error:
        sys.stderr.write(f"verl check: {error}\n")
        return 2
    runs = [_examine(command, scope) for command in captured.trainings]
    if not options.without_files and any(run.found.absent for run in runs):
        runs[0].found.notes.append(_PREPARE if captured.others else _ABSENT)
    ok = not any(run.found.errors for run in runs)
    if options.json:
        content = check_output.as_json(runs, captured.others, options.bandwidth)
        sys.stdout.write(json.dumps({"ok": ok, **content}, indent=2, default=str) + "\n")
    else:
        check_output.show(runs, captured.others, options.bandwidth)
    return 0 if ok else 1


def _scope(options: argparse.Namespace) -> Scope:
    if options.nodes is not None and options.device is None:
        raise ValueError(f"--nodes {options.nodes}: give --device too, which says what the nodes have")
    if options.bandwidth is not None and options.bandwidth <= 0:
        raise ValueError(f"--bandwidth {options.bandwidth:g}: give more than 0")
    hardware = None if options.device is None else Hardware(options.device, options.nodes)
    return Scope(starting=False, hardware=hardware, without_files=options.without_files)


def _commands(target: Sequence[str], hardware: Hardware | None) -> Capture:
    """The training commands of a script, or the one that overrides make."""
    first = Path(target[0]).expanduser()
    if "=" in target[0] and not first.is_file():
        return Capture((Command(tuple(target), Path.cwd(), dict(os.environ)),), (), "")
    if not first.is_file():
        raise ValueError(f"{target[0]}: no such script; give a shell script, or overrides as key=value")
    npu = find_spec("torch_npu") is not None if hardware is None else hardware.device == "npu"
    return capture(first, target[1:], npu=npu)


def _examine(command: Command, scope: Scope) -> Run:
    from verl.preflight.check import examine
    from verl.trainer.main_ppo import compose, import_external_lib

    # Relative paths are the script's.
    with contextlib.chdir(command.folder):
        try:
            config = compose(list(command.words))
            if config is None:
                raise ConfigError(["the command asks Hydra for help or for the config, and trains nothing"])
            import_external_lib(config)
            plan, found = examine(config, dataclasses.replace(scope, environment=command.environment))
        except ConfigError as error:
            plan, found = None, Findings(errors=list(error.problems))
        except SystemExit:
            plan, found = None, Findings(errors=["Hydra cannot compose the config; what it says is above"])
    return Run(command.words, plan, found)
