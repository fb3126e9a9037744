"""Entry point of the command `verl`: imports only the module of the given subcommand and runs it.

The module of a subcommand has `add_arguments(parser)` and `run(options) -> int`, which returns the exit status.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from verl import __version__
from verl.utils.console import escape_unencodable
from verl.utils.process_exit import STOPPED, end_on_interrupt, restore_interrupt


class Subcommand(NamedTuple):
    """One row of the table of subcommands.

    Attributes:
        module: module below `verl.cli`.
        help: one line.
        example: a command that works in a clone of the repository.
    """

    module: str
    help: str
    example: str


SUBCOMMANDS = {
    "train": Subcommand(
        "train",
        "train a model; the same as python3 -m verl.trainer.main_ppo",
        "verl train data.train_files=train.parquet data.val_files=test.parquet actor_rollout_ref.model.path=model",
    ),
    "check": Subcommand(
        "check",
        "check a training script or overrides without starting anything",
        "verl check examples/quickstart/run.sh --without-files",
    ),
    "describe": Subcommand(
        "describe",
        "show which layers of a model run in MXFP8 or MXFP4 on Ascend, and write vllm-ascend's description of them",
        "verl describe /path/to/Qwen3-8B --tp 2 -o description.json",
    ),
    "export": Subcommand(
        "export",
        "write the model of a checkpoint as a Hugging Face directory",
        "verl export outputs/quickstart/global_step_50 --out model",
    ),
    "doctor": Subcommand("doctor", "look for problems of this machine and its installed packages", "verl doctor"),
    "report": Subcommand("report", "write one HTML file about one or more runs", "verl report outputs/quickstart"),
    "completion": Subcommand(
        "completion", "print the completion script of a shell: bash, zsh or tcsh", 'eval "$(verl completion bash)"'
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status.

    Args:
        arguments: words of the command line; None for `sys.argv[1:]`.

    Returns:
        130 after Ctrl-C.
    """
    end_on_interrupt()
    try:
        return _run(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        sys.stderr.write(STOPPED)
        return 130
    finally:
        restore_interrupt()


def _run(given: list[str]) -> int:
    escape_unencodable()
    if given[:1] == ["train"]:
        # Hydra parses all other words, including `--help`.
        from verl.cli import train

        return train.run(given[1:])
    name = given[0] if given and given[0] in SUBCOMMANDS else None
    built = parser(load=() if name is None else (name,))
    options, rest = built.parse_known_args(given)
    # argparse does not accept words, then options, then words again. `rest` holds the second group of words.
    if rest and (not hasattr(options, "target") or any(word.startswith("-") for word in rest)):
        built.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.target += rest
    restore_interrupt()  # from here on there may be files and processes to clean up
    status: int = options.run(options)
    return status


def parser(load: Sequence[str] = tuple(SUBCOMMANDS)) -> argparse.ArgumentParser:
    """Return the parser of all subcommands.

    Args:
        load: subcommands with their arguments; the others have only their help line.
    """
    examples = "\n".join(f"  {command.example}" for command in SUBCOMMANDS.values())
    top = argparse.ArgumentParser(
        prog="verl",
        description="Reinforcement-learning post-training of language models.",
        epilog=f"examples:\n{examples}\n\nFor more help: `verl SUBCOMMAND --help`.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"verl {__version__}")
    subparsers = top.add_subparsers(dest="subcommand", metavar="SUBCOMMAND", required=True)
    for name, command in SUBCOMMANDS.items():
        sub = subparsers.add_parser(
            name,
            help=command.help,
            description=command.help[0].upper() + command.help[1:] + ".",
            epilog=f"example:\n  {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in load:
            module = importlib.import_module(f"verl.cli.{command.module}")
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    return top
