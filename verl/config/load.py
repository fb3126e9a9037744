"""Compose YAML files and overrides with Hydra into a `PPOConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl.config import legacy, searchpath, upstream
from verl.config.build import collect, unknown_key_problem
from verl.config.config_files import checked_files
from verl.config.errors import ConfigError
from verl.config.overrides import Prepared, prepare
from verl.config.ppo import PPOConfig
from verl.config.rollout_correction import contradictions
from verl.config.stream import complete
from verl.extension.paths import expand_user


@dataclasses.dataclass
class Loaded:
    """A config as far as it could be read.

    Attributes:
        config: the config; keys with problems have their defaults.
        problems: error texts, by key.
        notes: keys that are accepted without effect.
    """

    config: PPOConfig
    problems: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def valid(self) -> PPOConfig:
        """Return the config.

        Raises:
            ConfigError: it has problems.
        """
        if self.problems:
            raise ConfigError(dict.fromkeys(self.problems.values()))
        return self.config


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
        with checked_files(config_name, prepared.problems), _initialized(config_path):
            composed = compose(config_name, overrides=prepared.overrides)
    finally:
        GlobalHydra.instance().hydra = outer
    return read_composed(composed, prepared).valid()


def _initialized(config_path: str | Path | None) -> AbstractContextManager[Any]:
    """Return the Hydra context for the user's directory of YAML files, or for verl's."""
    if config_path is None:
        return initialize_config_module("verl.config", version_base="1.3")
    return initialize_config_dir(str(expand_user(config_path).absolute()), version_base="1.3")


def from_hydra(composed: DictConfig, given: Collection[str] = ()) -> PPOConfig:
    """Convert a composed config to the dataclasses, with all interpolations resolved.

    Args:
        composed: the config as Hydra composed it.
        given: keys that overrides set. They take precedence over old names in files. They contradict a preset even if
            they set the default.

    Raises:
        ConfigError: an unknown key, a value of a wrong type, an interpolation of a missing key, or a key that
            contradicts a preset or a fully asynchronous run.
    """
    return read_composed(composed, Prepared(given=set(given))).valid()


def read_composed(composed: DictConfig, prepared: Prepared) -> Loaded:
    """Convert a composed config to the dataclasses, and collect its problems.

    Args:
        composed: the config as Hydra composed it from `prepared.overrides`.

    Raises:
        ConfigError: an interpolation of a missing key, or an old section that is no mapping.
    """
    # Resolve first, because interpolations may use old names; move the old names afterwards.
    try:
        # Merge into the defaults: they contain interpolations, and a user's file may not include verl's files.
        merged = OmegaConf.merge(dataclasses.asdict(PPOConfig()), composed)
        values: Any = OmegaConf.to_container(merged, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        problems = dict(prepared.problems)
        _judge_unknown(PPOConfig(), prepared.unknown, prepared.old_names, problems)
        place = getattr(error, "full_key", None) or "config"
        raise ConfigError([*problems.values(), f"{place}: {str(error).splitlines()[0]}; correct the value"]) from error
    values.pop("hydra", None)
    values = _without_missing(legacy.migrate(values, prepared.given, upstream.at_default))
    config, collected = collect(PPOConfig, values)
    problems = prepared.problems | collected.problems
    reasons = _judge_unknown(config, collected.unknown | prepared.unknown, prepared.old_names, problems)
    # Only here can an explicitly given default be told from an omitted key.
    problems |= contradictions(config.algorithm.rollout_correction, prepared.given)
    problems |= complete(config, prepared.given)
    return Loaded(config, problems, upstream.notes(reasons))


def _judge_unknown(
    config: PPOConfig, unknown: Mapping[str, Any], old_names: Mapping[str, str], problems: dict[str, str]
) -> dict[str, str]:
    """Return why unknown keys have no effect, by key; add a problem for each of the others."""
    lookup, reasons = upstream.make_lookup(config, unknown), {}
    for key, value in unknown.items():
        reason = upstream.reason_without_effect(key, value, lookup)
        if reason is not None:
            reasons[key] = reason
            continue
        problem = unknown_key_problem(key, PPOConfig)
        renamed = key in old_names and f"'{key}'" in problem
        problems[key] = f"{old_names[key]} is now called {key}: {problem}" if renamed else problem
    return reasons


def _without_missing(values: Any) -> Any:
    """Return nested values without those that are `???`, Hydra's mark for a missing value."""
    if isinstance(values, dict):
        return {name: _without_missing(value) for name, value in values.items() if value != "???"}
    return values
