"""Check that the chat template of the tokenizer can be read; the run renders each prompt with it."""

from __future__ import annotations

from pathlib import Path

from verl.preflight.findings import Findings
from verl.preflight.light_tokenizer import template_problem


def check_chat_template(field: str, folder: str, found: Findings) -> None:
    """Refuse a template that is damaged, or no template of Jinja.

    Args:
        field: the key that names the tokenizer's directory.
        folder: this directory.
    """
    problem = template_problem(Path(folder))
    if problem is not None:
        found.errors.append(f"{field}={folder}: {problem}")
