"""`verl train`: the command line of `verl.trainer.main_ppo`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add overrides to the parser, for help and completion; Hydra parses the real command line."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="config keys, as listed in docs/config.md")


def run(arguments: Sequence[str]) -> int:
    """Train; return the exit status."""
    from verl.trainer.main_ppo import main

    try:
        main(arguments)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0
