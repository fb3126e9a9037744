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
        without_files: models and data may be elsewhere.
        absent: some of them are.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    without_files: bool = False
    absent: bool = False

    def missing(self, text: str) -> None:
        """A model or data file that is not here: an error, unless the run is to be elsewhere."""
        self.absent = True
        if self.without_files:
            self.warnings.append(f"not here, checked without it: {text}")
        else:
            self.errors.append(text)
