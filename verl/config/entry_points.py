"""The modules that start a run, under the names of upstream verl: `python3 -m MODULE key=value ...`.

All of them run the same training loop. A module has its own YAML file, whose values stand behind those of the command
line, and may fix the values of some keys, which select its kind of run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from verl.config.ppo import PPOConfig
from verl.config.schema import show

# The rollout's log-probabilities are the old ones, and the weights reach other nodes.
_ASYNCHRONOUS = {
    "algorithm.rollout_correction.bypass_mode": True,
    "actor_rollout_ref.rollout.nnodes": 1,
    "actor_rollout_ref.rollout.checkpoint_engine.backend": "nccl",
}


@dataclass(frozen=True)
class EntryPoint:
    """A module that starts a run.

    Attributes:
        module: its name.
        config_name: its YAML file in `verl/trainer/config`, without `.yaml`.
        values: keys whose value in this file is not the default.
        fixed: keys that have one value in every run of this module.
    """

    module: str
    config_name: str = "ppo_trainer"
    values: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def overrides(self) -> list[str]:
        """Return the fixed values as overrides, which stand in front of those of the user."""
        return [f"++{name}={show(value)}" for name, value in self.fixed.items()]

    def problems(self, config: PPOConfig) -> dict[str, str]:
        """Return an error text for each fixed key that has another value, by key."""
        found = {}
        for name, value in self.fixed.items():
            given: Any = config
            for part in name.split("."):
                given = given[part]
            if given != value:
                found[name] = (
                    f"{name}={show(given)}: {self.module} always runs with {show(value)}; leave it out, or start "
                    f"{MAIN_PPO.module}"
                )
        return found


MAIN_PPO = EntryPoint("verl.trainer.main_ppo")
ONE_STEP_OFF = EntryPoint(
    "verl.experimental.one_step_off_policy.main_ppo",
    "one_step_off_ppo_trainer",
    values=_ASYNCHRONOUS,
    fixed={"trainer.rollout_lag": 1},
)
FULLY_ASYNC = EntryPoint(
    "verl.experimental.fully_async_policy.fully_async_main",
    "fully_async_ppo_trainer",
    values={**_ASYNCHRONOUS, "data.gen_batch_size": 1, "async_training.enable": True},
    fixed={"async_training.enable": True, "trainer.v1.trainer_mode": "sync"},
)
ENTRY_POINTS = {
    entry.module: entry
    for entry in (
        MAIN_PPO,
        # Earlier names of the same program.
        EntryPoint("verl.trainer.main_ppo_sync"),
        ONE_STEP_OFF,
        FULLY_ASYNC,
    )
}
