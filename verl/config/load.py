"""Compose YAML files and overrides with Hydra into a `PPOConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl.config import legacy, searchpath
from verl.config.build import build
from verl.config.errors import ConfigError
from verl.config.overrides import prepare
from verl.config.ppo import PPOConfig
from verl.config.rollout_correction import contradictions


def load_config(
    overrides: Sequence[str] = (), config_path: str | Path | None = None, config_name: str = "ppo_trainer"
) -> PPOConfig:
    """Return the config that `python3 -m verl.trainer.main_ppo` would use.

    Args:
        overrides: `key=value`, as on the command line.
        config_path: directory of the user's own YAML file; None for verl's.
        config_name: name of the file without `.yaml`.

    Raises:
        ConfigError: as `from_hydra`, or a file cannot be composed.
    """
    prepared = prepare(overrides)
    searchpath.register()
    # The caller may itself be a Hydra program.
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with _initialized(config_path):
            composed = compose(config_name, overrides=prepared.overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([f"{config_name}: {error}"]) from error
    finally:
        GlobalHydra.instance().hydra = outer
    return from_hydra(composed, prepared.given)


def _initialized(config_path: str | Path | None) -> AbstractContextManager[Any]:
    """Return the Hydra context for the user's directory of YAML files, or for verl's."""
    if config_path is None:
        return initialize_config_module("verl.config", version_base="1.3")
    return initialize_config_dir(str(Path(config_path).expanduser().absolute()), version_base="1.3")


def from_hydra(composed: DictConfig, given: Collection[str] = ()) -> PPOConfig:
    """Convert a composed config to the dataclasses, with all interpolations resolved.

    Args:
        composed: the config as Hydra composed it.
        given: keys that overrides set. They take precedence over old names in files. They contradict a preset even if
            they set the default.

    Raises:
        ConfigError: an unknown key, a value of a wrong type, an interpolation of a missing key, or a key that
            contradicts a preset.
    """
    # Resolve first, because interpolations may use old names; move the old names afterwards.
    try:
        # Merge into the defaults: they contain interpolations, and a user's file may not include verl's files.
        merged = OmegaConf.merge(dataclasses.asdict(PPOConfig()), composed)
        values: Any = OmegaConf.to_container(merged, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise ConfigError([f"{getattr(error, 'full_key', None) or 'config'}: {str(error).splitlines()[0]}"]) from error
    values.pop("hydra", None)
    config = build(PPOConfig, _without_missing(legacy.migrate(values, given)))
    # Only here can an explicitly given default be told from an omitted key.
    problems = contradictions(config.algorithm.rollout_correction, given)
    if problems:
        raise ConfigError(problems)
    return config


def _without_missing(values: Any) -> Any:
    """Return nested values without those that are `???`, Hydra's mark for a missing value."""
    if isinstance(values, dict):
        return {name: _without_missing(value) for name, value in values.items() if value != "???"}
    return values
