"""Rewards: each sample scored as it finishes, by the user's function or a built-in scorer, in worker processes."""

from verl.workers.reward.function import RewardFunctionError
from verl.workers.reward.loop import RewardLoop, RewardResult, extra_columns
from verl.workers.reward.pool import RewardError

__all__ = ["RewardError", "RewardFunctionError", "RewardLoop", "RewardResult", "extra_columns"]
