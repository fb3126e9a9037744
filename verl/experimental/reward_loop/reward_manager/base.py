"""Base class of reward managers, under upstream verl's path; `verl.workers.reward_manager` has the implementation."""

from verl.workers.reward_manager import RewardManagerBase

__all__ = ["RewardManagerBase"]
