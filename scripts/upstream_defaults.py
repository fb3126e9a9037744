"""Write verl/config/upstream_defaults.json: the config keys of upstream verl and their defaults.

    python scripts/upstream_defaults.py CHECKOUT [OLDER_CHECKOUT ...]

Reads `verl/trainer/config/_generated_*_trainer.yaml` of each checkout. An entry of the result is a dotted key and the
list of its defaults, that of the newest checkout first. An interpolation is not resolved. Keys of the files for other
training engines are added if the file for FSDP lacks them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from verl.config.record import flat
from verl.config.upstream import FILE

_MAIN = "_generated_ppo_trainer.yaml"


def defaults_of(checkout: Path) -> dict[str, Any]:
    """Return the default of each key in one checkout, by dotted name.

    Raises:
        FileNotFoundError: the folder is no checkout of upstream verl.
    """
    folder = checkout / "verl/trainer/config"
    main = folder / _MAIN
    if not main.is_file():
        raise FileNotFoundError(f"{main}: no such file; give a checkout of upstream verl")
    found: dict[str, Any] = {}
    for path in (main, *sorted(folder.glob("_generated_*_trainer.yaml"))):
        values: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        found = flat(values) | found
    return found


def table(checkouts: list[Path]) -> dict[str, list[Any]]:
    """Return the different defaults of each key, that of the first checkout first."""
    merged: dict[str, list[Any]] = {}
    for checkout in checkouts:
        for key, default in defaults_of(checkout).items():
            known = merged.setdefault(key, [])
            if not any(default == value and type(default) is type(value) for value in known):
                known.append(default)
    return dict(sorted(merged.items()))


def main() -> None:
    """Write the file."""
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    found = table([Path(folder) for folder in sys.argv[1:]])
    lines = [f"{json.dumps(key)}: {json.dumps(defaults)}" for key, defaults in found.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
