"""`verl check --translate`: writes a training command for Megatron or VeOmni as a script for FSDP2."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from verl.cli.capture import Command
from verl.config.engine_keys import Translation


def notes(translation: Translation) -> list[str]:
    """Return what became of each key of the other engine, one note per new key or reason."""
    renamed = [f"for FSDP2, {old} becomes {new}" for old, new in translation.renamed]
    return renamed + [f"for FSDP2, no key replaces {', '.join(old)}: {why}" for why, old in translation.dropped.items()]


def script_text(command: Command, translation: Translation, source: str) -> str:
    """Return a shell script that runs the translated command.

    Args:
        command: the training command as it was.
        source: the script that starts it, for the comment at the top.
    """
    return "\n".join(_lines(command, translation, source)) + "\n"


def _lines(command: Command, translation: Translation, source: str) -> Iterator[str]:
    yield "#!/usr/bin/env bash"
    yield f"# The training command of {source} with FSDP2, written by `verl check --translate`. Not written here: what"
    yield "# the script does before the command, and the environment variables that it sets."
    yield "#"
    for note in notes(translation):
        yield f"# {note}"
    yield "set -euo pipefail"
    yield f"cd {shlex.quote(str(command.folder))}"
    yield f"python3 -m {command.entry.module} \\"
    for word in translation.overrides:
        yield f"    {shlex.quote(word)} \\"
    yield '    "$@"'


def write_script(path: Path, text: str) -> None:
    """Write an executable script.

    Raises:
        ValueError: the file exists already, or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
        path.chmod(0o755)
    except FileExistsError:
        raise ValueError(f"--translate {path}: exists already; give another name") from None
    except OSError as error:
        raise ValueError(f"--translate {path}: cannot be written ({error.strerror}); give another name") from None
