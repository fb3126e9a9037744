"""Registry of reward managers, under upstream verl's path; `verl.workers.reward_manager` has the implementation."""

from verl.workers.reward_manager import get_reward_manager_cls, register

__all__ = ["get_reward_manager_cls", "register"]
