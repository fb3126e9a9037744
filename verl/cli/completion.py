"""`verl completion`: what a shell has to know to complete the command line."""

from __future__ import annotations

import argparse
import sys

import shtab


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The shell."""
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="print the completion of this shell")


def run(options: argparse.Namespace) -> int:
    """Print the script; 0."""
    from verl.cli.entry import parser

    sys.stdout.write(shtab.complete(parser(), shell=options.shell) + "\n")
    return 0
