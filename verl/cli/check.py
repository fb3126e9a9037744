"""`verl check`: check a run without starting it.

Imports no torch, Ray or vLLM, unless the modules in `actor_rollout_ref.model.external_lib` import them. Other code of
the user runs in a child process.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from verl.cli import check_output
from verl.cli.capture import SECONDS, Capture, CaptureError, Command, capture
from verl.cli.check_output import Run
from verl.cli.translate import notes, script_text, write_script
from verl.config.engine_keys import Translation, translate
from verl.config.errors import ConfigError
from verl.extension.paths import expand_user
from verl.preflight.findings import Findings
from verl.preflight.target import HARDWARE, Hardware, Target

_DESCRIPTION = f"""\
Checks a training script, or the overrides of a run, without starting anything: keys and values, the model (its
config.json is enough), each row of the data, prompt lengths, batch sizes, parallel sizes, memory and weight updates.
Your own functions and classes (reward, dataset, estimator, loss, agent loops) are called or constructed once in another
process. Every error says what to do.

The shell commands of a script are run (variables, conditions, functions, cd, source). Its programs are not run: neither
the training command, whose arguments are checked, nor programs that prepare models and data. They count as successful
and print nothing. No file is written, except that a block with a redirection into a new file creates an empty file. A
script that is still running after {SECONDS:g} s is ended. Overrides behind the script are the script's arguments.
"""
_EPILOG = """\
exit status:
  0  no errors    1  errors    2  nothing to check: wrong usage, or no training command in the script

examples:
  verl check examples/quickstart/run.sh --without-files
  verl check examples/ascend950/run.sh --device npu:ascend950 --without-files --bandwidth 5.3
  verl check train.sh trainer.n_gpus_per_node=16 --json
  verl check data.train_files=train.parquet data.val_files=test.parquet actor_rollout_ref.model.path=model
"""
_OTHER_ENGINE = (
    "the command trains with Megatron or VeOmni, and FSDP2 is the only supported training engine: the notes show the "
    "keys of FSDP2, which the further errors are about; --translate FILE writes a script with them"
)
_MISSING = "files were not found: use --without-files to check the rest of the config"
_MISSING_FROM_SCRIPT = (
    "files were not found, and other programs of the script were not run: if these programs create the files, run them "
    "first, or use --without-files"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add arguments, description and examples to the parser."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument(
        "target",
        nargs="+",
        metavar="SCRIPT_OR_OVERRIDES",
        help="a shell script and its arguments, or overrides: key=value ...",
    )
    parser.add_argument(
        "--device",
        choices=HARDWARE,
        metavar="DEVICE",
        help=f"plan for other hardware than this machine: {', '.join(HARDWARE)}",
    )
    parser.add_argument("--nodes", type=int, metavar="N", help="number of hosts with --device")
    parser.add_argument(
        "--without-files",
        action="store_true",
        help="model and data may be on another machine: missing files are warnings, public models are known by name",
    )
    parser.add_argument(
        "--bandwidth",
        type=float,
        metavar="GB/s",
        help="print the duration of a full weight update at this bandwidth, in 10^9 bytes/s",
    )
    parser.add_argument(
        "--translate",
        type=Path,
        metavar="FILE",
        help="write the training command of a script for Megatron or VeOmni as a new script for FSDP2",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Check and print; return the exit status."""
    try:
        target = _target(options)
        captured = _capture(options.target, target.hardware)
        translations = [translate(command.words) for command in captured.trainings]
        if options.translate is not None:
            _translate(captured.trainings, translations, options)
    except (CaptureError, ValueError) as error:
        sys.stderr.write(f"verl check: {error}\n")
        return 2
    runs = [
        examine_command(command, translation, target, written=options.translate is not None)
        for command, translation in zip(captured.trainings, translations, strict=True)
    ]
    if not options.without_files and any(run.found.files_missing for run in runs):
        runs[0].found.notes.append(_MISSING_FROM_SCRIPT if captured.others else _MISSING)
    if options.json:
        content = check_output.as_json(runs, captured.others, options.bandwidth)
        sys.stdout.write(json.dumps(content, indent=2, default=str) + "\n")
    else:
        check_output.show(runs, captured.others, options.bandwidth)
    return 0 if check_output.is_ok(runs) else 1


def _target(options: argparse.Namespace) -> Target:
    """Return the target of the command line.

    Raises:
        ValueError: options contradict each other or are out of bounds.
    """
    if options.nodes is not None and options.device is None:
        raise ValueError(f"--nodes {options.nodes}: give --device too, which sets the hardware of the nodes")
    if options.bandwidth is not None and options.bandwidth <= 0:
        raise ValueError(f"--bandwidth {options.bandwidth:g}: must be above 0")
    hardware = None if options.device is None else Hardware(options.device, options.nodes)
    return Target(starting=False, hardware=hardware, without_files=options.without_files)


def _capture(words: Sequence[str], hardware: Hardware | None) -> Capture:
    """Return the training commands of a script, or one command built from overrides if there is no script."""
    first = expand_user(words[0])
    if "=" in words[0] and not first.is_file():
        return Capture((Command(tuple(words), Path.cwd(), dict(os.environ)),), (), "")
    if not first.is_file():
        raise ValueError(f"{words[0]}: no such script; give a shell script, or overrides as key=value")
    npu = find_spec("torch_npu") is not None if hardware is None else hardware.device == "npu"
    return capture(first, words[1:], npu=npu)


def _translate(commands: Sequence[Command], translations: Sequence[Translation], options: argparse.Namespace) -> None:
    """Write the script of `--translate`.

    Raises:
        ValueError: not exactly one training command, nothing to translate or no equivalent, or the file exists.
    """
    if len(commands) != 1:
        raise ValueError(f"--translate {options.translate}: the script has {len(commands)} training commands, not one")
    [translation] = translations
    if not translation.needed:
        raise ValueError(f"--translate {options.translate}: the training command names no other engine than FSDP2")
    if translation.refused:
        raise ValueError(f"--translate {options.translate}: no equivalent for {'; '.join(translation.refused)}")
    write_script(options.translate, script_text(commands[0], translation, options.target[0]))


def examine_command(command: Command, translation: Translation, target: Target, *, written: bool) -> Run:
    """Check a command with the keys of FSDP2. One for another engine has an error unless its translation is written."""
    if not translation.needed:
        return _examine(command, target)
    run = _examine(dataclasses.replace(command, words=tuple(translation.overrides)), target)
    run.found.notes = [*notes(translation), *run.found.notes]
    run.found.errors = [*translation.refused, *run.found.errors]
    if not written:
        run.found.errors.insert(0, _OTHER_ENGINE)
    return run


def _examine(command: Command, target: Target) -> Run:
    from verl.preflight.check import examine
    from verl.trainer.main_ppo import compose, import_external_lib
    from verl.trainer.probes.process import Probes

    # Relative paths are relative to the script's working directory.
    with contextlib.chdir(command.folder):
        try:
            loaded = compose(list(command.words), command.entry)
            if loaded is None:
                raise ConfigError(["the command asks Hydra for its help or for the config, and trains nothing"])
            config = loaded.config
            with Probes(config, starting=False) as probes:
                import_external_lib(config)
                there = dataclasses.replace(target, environment=command.environment)
                plan, found = examine(config, there, loaded.problems, loaded.notes)
                elsewhere = target.hardware is not None or target.without_files
                probes.check(config, found, device="cpu" if plan is None else plan.device, elsewhere=elsewhere)
        except ConfigError as error:
            plan, found = None, Findings(errors=list(error.problems))
        except SystemExit:
            plan, found = None, Findings(errors=["Hydra cannot read the options; see its message above"])
    return Run(command.words, plan, found)
