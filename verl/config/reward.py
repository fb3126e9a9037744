"""`reward`: scoring of responses."""

# ruff: noqa: RUF009  (key, unsupported and section return dataclass fields)
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from verl.config import names
from verl.config.conditions import unless
from verl.config.schema import ConfigSection, key, section, unsupported
from verl.utils.host import cpu_cores

# Entries of reward_kwargs that the dapo manager reads; they are never passed to the scorer.
MANAGER_KWARGS = ("max_resp_len", "overlong_buffer_cfg")
# Keywords that a scorer is called with.
SCORER_ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")
_MAX_WORKERS = 8


@dataclass
class CustomRewardFunctionConfig(ConfigSection):
    """The user's own scorer."""

    path: str | None = key(
        None, "Python file of your own scorer; null: the built-in scorers, chosen by the data source of a row"
    )
    name: str = key(
        "compute_score",
        "function in this file; it is called with data_source, solution_str, ground_truth and extra_info",
        only_with=unless("path", None, reason="with the built-in scorers"),
    )
    reward_kwargs: dict[str, Any] = key({}, "further keyword arguments of the scorer, equal for all samples")


@dataclass
class RewardManagerConfig(ConfigSection):
    """Computation of rewards from scores."""

    name: str = key(
        "naive",
        "naive: the reward is the score; dapo: the score minus a penalty for length "
        "(reward_kwargs.overlong_buffer_cfg); gdpo: the score, with its components (algorithm.gdpo_reward_keys); or "
        "the name of your own manager, registered by a module of model.external_lib",
        choices=names.REWARD_MANAGERS,
        unsupported=names.UNSUPPORTED_REWARD_MANAGERS,
        use="use naive",
    )


@dataclass
class RewardModelConfig(ConfigSection):
    """Keys of a reward model, which is not supported."""

    enable: bool = unsupported(False, "a reward model", "use reward.custom_reward_function")
    model_path: str | None = unsupported(None, "a reward model", "use reward.custom_reward_function")


@dataclass
class RewardConfig(ConfigSection):
    """Scoring of responses."""

    custom_reward_function: CustomRewardFunctionConfig = section(CustomRewardFunctionConfig, "your own scorer")
    reward_manager: RewardManagerConfig = section(RewardManagerConfig, "computation of rewards from scores")
    reward_kwargs: dict[str, Any] = key(
        {},
        "max_resp_len and overlong_buffer_cfg configure the dapo manager; other entries are keyword arguments of the "
        "scorer",
        entries_only_with=dict.fromkeys(MANAGER_KWARGS, unless("reward.reward_manager.name", "naive", "gdpo")),
    )
    num_workers: int | None = key(
        None, "processes that score; null: one per core, at most 8", unit="processes", at_least=1
    )
    timeout: float = key(
        30.0, "time limit for scoring one sample; a sample that exceeds it gets the score 0", unit="seconds", above=0
    )
    reward_model: RewardModelConfig = section(RewardModelConfig, "a reward model: not supported")

    @property
    def workers(self) -> int:
        """Number of processes that score."""
        return min(_MAX_WORKERS, cpu_cores()) if self.num_workers is None else self.num_workers
