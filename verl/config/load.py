"""Composes YAML files and overrides with Hydra into a `PPOConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
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
    """The config that `python3 -m verl.trainer.main_ppo` would run with.

    Args:
        overrides: `key=value` as on the command line.
        config_path: directory of a YAML file of your own; null for the framework's.
        config_name: that file, without `.yaml`.

    Raises:
        ConfigError: as `from_hydra`, or a file that cannot be composed.
    """
    prepared = prepare(overrides)
    searchpath.register()
    # The caller may itself be a Hydra program.
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        if config_path is None:
            context = initialize_config_module("verl.config", version_base="1.3")
        else:
            context = initialize_config_dir(str(Path(config_path).expanduser().absolute()), version_base="1.3")
        with context:
            composed = compose(config_name, overrides=prepared.overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([f"{config_name}: {error}"]) from error
    finally:
        GlobalHydra.instance().hydra = outer
    return from_hydra(composed, prepared.given)


def from_hydra(composed: DictConfig, given: Collection[str] = ()) -> PPOConfig:
    """The dataclasses of a composed config, interpolations resolved.

    Args:
        given: keys that overrides set; they win over old spellings in files, and contradict a preset also where they
            set the default.

    Raises:
        ConfigError: an unknown key, a value of a wrong type, an interpolation that leads nowhere, or a key beside a
            preset that says otherwise.
    """
    # A file may use another's keys through interpolation, old spellings included: resolve first, move then.
    try:
        # The defaults below: one may refer to other keys, and a user's file need not build on the framework's.
        whole = OmegaConf.merge(dataclasses.asdict(PPOConfig()), composed)
        values: Any = OmegaConf.to_container(whole, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise ConfigError([f"{getattr(error, 'full_key', None) or 'config'}: {str(error).splitlines()[0]}"]) from error
    values.pop("hydra", None)
    config = build(PPOConfig, _without_missing(legacy.migrate(values, given)))
    # Only here is it known that a key was given, where it is given its default.
    problems = contradictions(config.algorithm.rollout_correction, given)
    if problems:
        raise ConfigError(problems)
    return config


def _without_missing(values: Any) -> Any:
    """Hydra's `???` is a value that is not given."""
    if isinstance(values, dict):
        return {name: _without_missing(value) for name, value in values.items() if value != "???"}
    return values
