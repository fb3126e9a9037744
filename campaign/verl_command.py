"""A command of verl as a case runs it: everything but the training itself."""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import yaml
from hydra import compose, initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from campaign.sandbox import overrides
from verl.cli.entry import main
from verl.config import PPOConfig, searchpath
from verl.config.build import build
from verl.config.errors import ConfigError
from verl.config.load import Loaded, read_composed
from verl.config.overrides import prepare
from verl.config.schema import walk
from verl.preflight.plan import Plan
from verl.trainer import main_ppo
from verl.utils.tracking.plain import mask_secrets


def preload() -> None:
    """Import the packages of the commands once for all cases, and compose the defaults."""
    import pyarrow.parquet
    import torch
    import transformers  # noqa: F401

    import verl.cli.check
    import verl.cli.describe
    import verl.preflight
    import verl.report.page  # noqa: F401

    assert pyarrow.parquet and torch
    # Fills the caches of the checks. The files do not exist: reading them would start threads, which no fork has.
    with contextlib.suppress(ConfigError):
        main_ppo.checked_plan(_compose([*overrides(), "data.train_batch_size=0"]))
    _defaults.cache_clear()
    _defaults()
    gc.collect()
    gc.freeze()  # the collector of a fork would copy the pages of all objects


def body(words: Sequence[str], *, composes: bool) -> Callable[[], int]:
    """Return a function that runs a command line of verl and returns its exit status.

    `verl train` ends before its first process starts. The record of its config is then written and read as text.

    Args:
        composes: see `Case`.
    """

    def run() -> int:
        # The process of a case ends after it, so that nothing is put back.
        for name, replacement in {"execute": _record, **({} if composes else {"compose": _compose})}.items():
            setattr(main_ppo, name, replacement)
        return main(words)

    return run


def _record(config: PPOConfig, plan: Plan) -> int:
    """Compare the config with its record, as a resumed run reads it."""
    text = yaml.safe_dump(mask_secrets(config), sort_keys=False, allow_unicode=True, width=120)
    again = {name: value for name, _, value in walk(build(PPOConfig, yaml.safe_load(text)))}
    for name, _, value in walk(config):
        if again[name] != value and "***" not in str(again[name]):
            sys.stderr.write(f"{name}={value}: the record of the config reads as {again[name]!r}\n")
            return 1
    return 0


@functools.cache
def _defaults() -> DictConfig:
    searchpath.register()
    with initialize_config_module("verl.trainer.config", version_base="1.3"):
        return compose("ppo_trainer")


def _compose(arguments: list[str], *_: Any) -> Loaded:
    """Apply overrides to the composed defaults, as Hydra does at the end of a composition."""
    prepared, composed = prepare(arguments), _defaults()
    try:
        parsed = OverridesParser.create().parse_overrides(prepared.overrides)
        with flag_override(composed, "struct", True):
            ConfigLoaderImpl._apply_overrides_to_config(parsed, composed)
    except (HydraException, OmegaConfBaseException) as error:
        # Hydra prints such errors and ends the process.
        raise ConfigError([f"{' '.join(prepared.overrides)}: {error}"]) from error
    # The defaults have every key, so that merging them into the dataclasses' values changes nothing; it takes most of
    # the time of a case.
    with mock.patch.object(OmegaConf, "merge", lambda _, merged: merged):
        return read_composed(composed, prepared)
