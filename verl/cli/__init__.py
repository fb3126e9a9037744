"""The command `verl`: one table of subcommands, each in a module that is imported when it is asked for.

Nothing here imports torch, Ray or vLLM, so that `verl check` and every `--help` answer at once.
"""

from verl.cli.entry import main

__all__ = ["main"]
