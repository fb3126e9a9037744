"""`skip`: stages of a training step whose results are read from files instead of computed."""

# ruff: noqa: RUF009  (key and section return dataclass fields)
from __future__ import annotations

from dataclasses import dataclass

from verl.config.conditions import when
from verl.config.schema import ConfigSection, key, section

_ENABLED = when("enable")


@dataclass
class RolloutSkipConfig(ConfigSection):
    """Cached rollouts: samples and rewards of chosen steps."""

    enable: bool = key(
        False, "keep the samples and rewards of the steps in `steps`, and train on kept ones instead of generating"
    )
    dump_dir: str = key(
        "~/.verl/rollout_dump",
        "directory of the files, in EXPERIMENT_PROJECT/GBS.._N.._in.._out../STEP",
        path=True,
        only_with=_ENABLED,
    )
    steps: list[int] = key([], "training steps to keep or to read", at_least=1, only_with=_ENABLED)
    action: str = key(
        "cache",
        "a step in `steps` without files of its own; cache: it is generated and kept; repeat: it trains on the samples "
        "of the nearest step that has files, an earlier one if there is one",
        choices=("cache", "repeat"),
        only_with=_ENABLED,
    )


@dataclass
class SkipConfig(ConfigSection):
    """Stages of a step that read their results from files."""

    rollout: RolloutSkipConfig = section(RolloutSkipConfig, "cached rollouts")
