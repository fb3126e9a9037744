"""The command `verl`: a table of subcommands, whose modules are imported only when they are used.

Imports no torch, Ray or vLLM, so that `verl check` and every `--help` start fast.
"""

from verl.cli.entry import main

__all__ = ["main"]
