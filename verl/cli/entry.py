"""The entry point: finds the subcommand, imports its module alone, and hands it what its parser makes of the arguments.

A subcommand's module has `add_arguments(parser)` and `run(options) -> int`, the exit status.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from verl import __version__


class Subcommand(NamedTuple):
    """One row of the table.

    Attributes:
        module: under `verl.cli`.
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
        "show which layers of a model run in MXFP8 on Ascend, and write vllm-ascend's description",
        "verl describe /path/to/Qwen3-8B --tp 2 -o description.json",
    ),
    "doctor": Subcommand(
        "doctor", "look for what is wrong with this machine and what is installed on it", "verl doctor"
    ),
    "report": Subcommand("report", "write one HTML file about one or more runs", "verl report outputs/quickstart"),
    "completion": Subcommand(
        "completion", "print the completion of a shell: bash, zsh or tcsh", 'eval "$(verl completion bash)"'
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; `arguments` in the place of `sys.argv[1:]`. Returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["train"]:
        # Hydra has the rest of the line to itself, `--help` included.
        from verl.cli import train

        return train.run(given[1:])
    name = given[0] if given and given[0] in SUBCOMMANDS else None
    built = parser(load=() if name is None else (name,))
    options, rest = built.parse_known_args(given)
    # argparse takes no words behind options that stand behind words.
    if rest and (not hasattr(options, "target") or any(word.startswith("-") for word in rest)):
        built.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.target += rest
    return options.run(options)


def parser(load: Sequence[str] = tuple(SUBCOMMANDS)) -> argparse.ArgumentParser:
    """The whole parser; the subcommands in `load` with their arguments, the others with their help alone."""
    examples = "\n".join(f"  {command.example}" for command in SUBCOMMANDS.values())
    top = argparse.ArgumentParser(
        prog="verl",
        description="Reinforcement-learning post-training of language models.",
        epilog=f"examples:\n{examples}\n\n`verl SUBCOMMAND --help` says more.",
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
