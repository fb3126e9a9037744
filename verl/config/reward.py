"""`reward`: how a response is scored."""

# ruff: noqa: RUF009  (key, planned and section make dataclass fields)
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from verl.config import names
from verl.config.schema import key, planned, section
from verl.utils.host import cpu_cores

_MOST_WORKERS = 8


@dataclass
class CustomRewardFunctionConfig:
    """The user's scorer."""

    path: str | None = key(None, "Python file of your scorer; null for the built-in ones, chosen by data source")
    name: str = key("compute_score", "function in it: (data_source, solution_str, ground_truth, extra_info)")
    reward_kwargs: dict[str, Any] = key({}, "further keywords for it, the same for every sample")


@dataclass
class RewardManagerConfig:
    """How scores become rewards."""

    name: str = key(
        "naive",
        "naive: the score is the reward; dapo: less a penalty for length (reward_kwargs.overlong_buffer_cfg); gdpo: "
        "the score's components (algorithm.gdpo_reward_keys) go along",
        choices=names.REWARD_MANAGERS,
        planned=names.UNSUPPORTED_REWARD_MANAGERS,
        use="use naive",
    )


@dataclass
class RewardModelConfig:
    """A model that scores, known and not supported yet."""

    enable: bool = planned(False, "a reward model", "use reward.custom_reward_function")
    model_path: str | None = planned(None, "a reward model", "use reward.custom_reward_function")


@dataclass
class RewardConfig:
    """How a response is scored."""

    custom_reward_function: CustomRewardFunctionConfig = section(CustomRewardFunctionConfig, "your scorer")
    reward_manager: RewardManagerConfig = section(RewardManagerConfig, "how scores become rewards")
    reward_kwargs: dict[str, Any] = key(
        {}, "max_resp_len and overlong_buffer_cfg are the dapo manager's; others are keywords for the scorer"
    )
    num_workers: int | None = key(
        None, "processes that score, null for one a core but at most 8", unit="processes", at_least=1
    )
    timeout: float = key(30.0, "time to score one sample, after which its score is 0", unit="seconds", above=0)
    reward_model: RewardModelConfig = section(RewardModelConfig, "a model that scores: not supported yet")

    @property
    def workers(self) -> int:
        """Processes that score."""
        return min(_MOST_WORKERS, cpu_cores()) if self.num_workers is None else self.num_workers
