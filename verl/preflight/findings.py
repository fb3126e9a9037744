"""Results of the checks: errors, which prevent a run, and warnings and notes, which its plan shows."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Findings:
    """Every check adds to these lists, so that a user sees all problems at once.

    Attributes:
        errors: problems that prevent the run; each text gives the field, its value and the way to correct it.
        warnings: probable mistakes.
        notes: keys without effect in this run, and assumptions of the check.
        without_files: model and data may be on another machine.
        files_missing: at least one model or data file was not found.
        sizes_fit: no error makes the numbers of the plan wrong.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    without_files: bool = False
    files_missing: bool = False
    sizes_fit: bool = True

    def add_size_error(self, text: str) -> None:
        """Add an error about sizes that do not fit together, so that a plan with them would show wrong numbers."""
        self.sizes_fit = False
        self.errors.append(text)

    def add_missing_file(self, text: str) -> None:
        """Add a missing model or data file: an error, or with `without_files` a warning."""
        self.files_missing = True
        if self.without_files:
            self.warnings.append(f"not found, checked without it: {text}")
        else:
            self.errors.append(text)
