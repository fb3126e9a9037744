"""Rewards: worker processes score each sample as it finishes, with the user's function or a built-in scorer."""

from verl.workers.reward.function import RewardFunctionError
from verl.workers.reward.loop import RewardLoop, RewardResult, extra_columns, renamed_extra
from verl.workers.reward.pool import RewardError

__all__ = ["RewardError", "RewardFunctionError", "RewardLoop", "RewardResult", "extra_columns", "renamed_extra"]
