"""Registry of the user's reward managers, which `reward.reward_manager.name` selects."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, TypeVar, cast

from verl.config import names
from verl.extension.registry import Registry, registered_name
from verl.extension.user_class import refuse_uncalled
from verl.workers.reward_manager.abstract import AbstractRewardManager
from verl.workers.reward_manager.base import RewardManagerBase

T = TypeVar("T", bound=type[AbstractRewardManager] | type[RewardManagerBase])
REWARD_MANAGERS = Registry("reward manager", "reward.reward_manager.name", names.UNSUPPORTED_REWARD_MANAGERS)


def register(name: str | Enum) -> Callable[[T], T]:
    """Return a decorator that registers a subclass of `RewardManagerBase` or `AbstractRewardManager`.

    Raises:
        TypeError: the name is neither text nor a member of an enum of texts, or the class has another base.
        ValueError: a built-in manager or another class has the name, or the class overrides a method that is never
            called.
    """
    text = registered_name(name, "reward manager")
    if text in names.REWARD_MANAGERS:
        raise ValueError(f"reward manager {text!r} is built in; choose another name")

    def add(cls: T) -> T:
        bases = (RewardManagerBase, AbstractRewardManager)
        base = next((base for base in bases if isinstance(cls, type) and issubclass(cls, base)), None)
        if base is None:
            raise TypeError(f"reward manager {text!r}: {cls!r} must be a subclass of RewardManagerBase")
        refuse_uncalled(cls, base)
        return REWARD_MANAGERS.register(text)(cls)

    return add


def get_reward_manager_cls(name: str | Enum) -> type[Any]:
    """Return the class registered under `name`.

    Raises:
        ValueError: no class has that name; the built-in managers (naive, dapo, gdpo) are no classes to subclass.
    """
    return cast(type[Any], REWARD_MANAGERS.get(name))
