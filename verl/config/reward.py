"""`reward`: scoring of responses."""

# ruff: noqa: RUF009  (key, unsupported and section return dataclass fields)
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from verl.config import names
from verl.config.conditions import unless, when
from verl.config.reward_model import RewardModelConfig
from verl.config.schema import ConfigSection, key, section
from verl.utils.host import cpu_cores

# Entries of reward_kwargs that the dapo manager reads; they are never passed to the scorer.
MANAGER_KWARGS = ("max_resp_len", "overlong_buffer_cfg")
# Keywords that a scorer is called with.
SCORER_ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")
# Further keywords of the user's function in a run with a reward model, as in upstream verl.
REWARD_MODEL_ARGUMENTS = ("reward_router_address", "reward_model_tokenizer")
_MAX_WORKERS = 8
# Replies of a reward model wait for each other in its engines.
_TIMEOUT_S, _TIMEOUT_WITH_MODEL_S = 30.0, 600.0


@dataclass
class CustomRewardFunctionConfig(ConfigSection):
    """The user's own scorer."""

    path: str | None = key(
        None, "Python file of your own scorer; null: the built-in scorers, chosen by the data source of a row"
    )
    name: str = key(
        "compute_score",
        "function in this file; it is called with data_source, solution_str, ground_truth and extra_info, and with a "
        "reward model also with reward_router_address and reward_model_tokenizer",
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
    timeout: float | None = key(
        None,
        "time limit for scoring one sample; a sample that exceeds it gets the score 0; null: 30, and 600 with a reward "
        "model",
        unit="seconds",
        above=0,
        at_most=1e6,
    )
    reward_model: RewardModelConfig = section(
        RewardModelConfig, "a reward model", only_with=when("reward.reward_model.enable")
    )

    @property
    def workers(self) -> int:
        """Number of processes that score."""
        return min(_MAX_WORKERS, cpu_cores()) if self.num_workers is None else self.num_workers

    @property
    def time_limit(self) -> float:
        """Time limit for scoring one sample, in seconds."""
        if self.timeout is not None:
            return self.timeout
        return _TIMEOUT_WITH_MODEL_S if self.reward_model.enable else _TIMEOUT_S

    @property
    def scored_by_model(self) -> bool:
        """True if the reward model scores the responses itself: the user has no function that asks it."""
        return self.reward_model.enable and self.custom_reward_function.path is None
