"""Files of results: one JSON object a line, appended as a campaign proceeds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def append(file: Path, record: Mapping[str, Any]) -> None:
    """Append a record to a file, which is created if missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """Return the records of a file; a line that an interrupted campaign cut off does not count."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
