"""What a run writes down of its own config: `config.yaml` and `config_changes.yaml` in `trainer.default_local_dir`.

`config.yaml` holds every key as the run uses it, `config_changes.yaml` by dotted name those that differ from the
framework's defaults, each with its `value` and `default`. Secrets are `***` in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from verl.config.load import load_config
from verl.config.ppo import PPOConfig
from verl.utils.atomic_io import atomic_write_text
from verl.utils.tracking.plain import mask_secrets

CONFIG_FILE, CHANGES_FILE = "config.yaml", "config_changes.yaml"


def write_record(config: PPOConfig, directory: str | Path) -> None:
    """Write both files, over those of an earlier run.

    Args:
        config: of the run.
        directory: made if missing.

    Raises:
        OSError: a file cannot be written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, values in ((CONFIG_FILE, mask_secrets(config)), (CHANGES_FILE, changes(config))):
        atomic_write_text(directory / name, yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120))


def changes(config: PPOConfig) -> dict[str, dict[str, Any]]:
    """`{"trainer.nnodes": {"value": 2, "default": 1}, ...}` for every key whose value is not the default."""
    values, defaults = flat(mask_secrets(config)), flat(mask_secrets(load_config()))
    return {
        name: {"value": value, "default": defaults.get(name)}
        for name, value in values.items()
        if name not in defaults or value != defaults[name]
    }


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted names; an empty mapping is a value."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[f"{prefix}{name}"] = value
    return result
