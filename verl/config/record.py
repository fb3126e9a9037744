"""The record of a run's config: `config.yaml` and `config_changes.yaml` in `trainer.default_local_dir`.

A run writes them when it begins (`verl.trainer.ppo.run_records`). Each checkpoint contains a copy of both files. A run
with `trainer.val_only` writes them and its logs into `val_only/global_step_N`, because the others belong to the run
that trained.

`config.yaml` contains every key with the value that the run uses. `config_changes.yaml` contains the keys whose value
is not the default, by dotted name, each with its `value` and `default`. Both files contain `***` instead of secrets.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from verl.config.build import build
from verl.config.load import load_config
from verl.config.ppo import PPOConfig
from verl.utils.atomic_io import atomic_write_text
from verl.utils.plain_data import parse_yaml
from verl.utils.tracking.plain import mask_secrets

VAL_ONLY_DIRECTORY = "val_only"  # logs and records of runs with trainer.val_only, by step
CONFIG_FILE, CHANGES_FILE = "config.yaml", "config_changes.yaml"


def write_record(config: PPOConfig, directory: str | Path) -> None:
    """Write config.yaml and config_changes.yaml, and overwrite those of an earlier run.

    Args:
        config: config of the run.
        directory: where to write; it is created if it does not exist.

    Raises:
        OSError: a file cannot be written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in record_texts(config).items():
        atomic_write_text(directory / name, text)


def record_texts(config: PPOConfig) -> dict[str, str]:
    """Return the contents of config.yaml and config_changes.yaml."""
    return {
        name: yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
        for name, values in ((CONFIG_FILE, mask_secrets(config)), (CHANGES_FILE, changes(config)))
    }


def read_record(directory: Path) -> PPOConfig:
    """Return the config that `write_record` wrote; secrets in it are `***`.

    Raises:
        FileNotFoundError: the directory contains no config.yaml.
        ValueError: the file is damaged.
        ConfigError: another version of verl wrote it, with keys that this version does not have.
    """
    file = directory / CONFIG_FILE
    try:
        values = parse_yaml(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} is damaged: it contains no keys")
    return build(PPOConfig, values)


def changes(config: PPOConfig) -> dict[str, dict[str, Any]]:
    """Return `{"trainer.nnodes": {"value": 2, "default": 1}, ...}` for every key whose value is not the default."""
    values, defaults = flat(mask_secrets(config)), _defaults()
    return {
        name: {"value": value, "default": defaults.get(name)}
        for name, value in values.items()
        if name not in defaults or value != defaults[name]
    }


@functools.cache
def _defaults() -> dict[str, Any]:
    """Return every key's default by dotted name; composing them takes longer than writing a small checkpoint."""
    return flat(mask_secrets(load_config()))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping by dotted name; an empty mapping counts as a value."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[f"{prefix}{name}"] = value
    return result
