"""`verl completion`: print the completion script of a shell."""

from __future__ import annotations

import argparse
import sys

import shtab


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the shell's name to the parser."""
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="print the completion script of this shell")


def run(options: argparse.Namespace) -> int:
    """Print the script; return 0."""
    from verl.cli.entry import parser

    sys.stdout.write(shtab.complete(parser(), shell=options.shell) + "\n")
    return 0
