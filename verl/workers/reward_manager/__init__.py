"""The user's reward managers: base classes and registry. `verl.workers.reward.managers` has the built-in ones."""

from verl.workers.reward_manager.abstract import AbstractRewardManager
from verl.workers.reward_manager.base import RewardManagerBase
from verl.workers.reward_manager.registry import get_reward_manager_cls, register

__all__ = ["AbstractRewardManager", "RewardManagerBase", "get_reward_manager_cls", "register"]
