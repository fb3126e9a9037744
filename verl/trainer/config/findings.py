"""What the checks find: errors that stop a run, warnings and notes that its plan shows."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Findings:
    """Collected by every check, so that a user sees all problems at once.

    Attributes:
        errors: each names field, value and what to do.
        warnings: what will probably disappoint.
        notes: what has no effect in this run.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
