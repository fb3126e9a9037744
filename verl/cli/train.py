"""`verl train`: the command line of `verl.trainer.main_ppo`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """For the help of `verl` and for shells; Hydra reads the line itself."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the config, as docs/config.md lists")


def run(arguments: Sequence[str]) -> int:
    """Train; the exit status."""
    from verl.trainer.main_ppo import main

    try:
        main(arguments)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0
