"""Reward managers (`reward.reward_manager.name`): from the scorer's return value to a sample's reward.

They run in the driver, on samples whose scoring succeeded. A failed sample keeps its 0.0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from verl.config import RewardConfig
    from verl.config.reward_kwargs import OverlongBuffer

Extra = dict[str, Any]


class ComponentError(ValueError):
    """A reward function did not return a required component."""


class RewardManager(Protocol):
    """Turns a score into a reward."""

    def reward(self, score: float, extra: Extra, response_length: int | None) -> tuple[float, Extra]:
        """Return the reward of one sample, and its extra values.

        Args:
            score: the scorer's score, finite.
            extra: the scorer's other values; not modified.
            response_length: tokens of the response, including tool tokens; None if the caller has no tokens.
        """
        ...


class NaiveManager:
    """The score is the reward."""

    def reward(self, score: float, extra: Extra, response_length: int | None) -> tuple[float, Extra]:
        return score, extra


@dataclass(frozen=True)
class DapoManager:
    """The score minus a penalty for a response near or beyond the length limit.

    The extra value `score` is the score without the penalty. With the buffer's `log`, `overlong_reward` (at most 0) and
    `overlong` (True with a penalty) are added.
    """

    buffer: OverlongBuffer | None

    def reward(self, score: float, extra: Extra, response_length: int | None) -> tuple[float, Extra]:
        """Raise ValueError if the response's length is unknown."""
        if self.buffer is None:
            return score, extra
        if response_length is None:
            raise ValueError("reward.reward_manager.name=dapo: pass response_length, the tokens of the response")
        penalty = overlong_penalty(response_length, self.buffer)
        extra = {**extra, "score": score}
        if self.buffer.log:
            extra |= {"overlong_reward": penalty, "overlong": penalty < 0}
        return score + penalty, extra


def overlong_penalty(response_length: int, buffer: OverlongBuffer) -> float:
    """Return 0 up to `max_resp_len - buffer_len` tokens, then a linear penalty, `-penalty_factor` at `max_resp_len`.

    Beyond `max_resp_len` the penalty keeps falling, as in upstream verl; the paper (arXiv 2503.14476, equation 13) has
    a constant there. The difference only matters if `data.max_response_length` is larger than `max_resp_len`.
    """
    excess = response_length - (buffer.max_resp_len - buffer.buffer_len)
    return min(0.0, -excess / buffer.buffer_len * buffer.penalty_factor)


@dataclass(frozen=True)
class GdpoManager:
    """The score is the reward, and every component must be a finite number among the extra values.

    The component `score` is the score itself.
    """

    components: tuple[str, ...]

    def reward(self, score: float, extra: Extra, response_length: int | None) -> tuple[float, Extra]:
        """Raise ComponentError, naming components that are missing or not finite."""
        values = {"score": score, **extra}
        if missing := [name for name in self.components if name not in values]:
            raise ComponentError(
                f"algorithm.gdpo_reward_keys={list(self.components)}: the reward function returned no "
                f"{', '.join(missing)} for a sample (it returned {', '.join(values)}); return every component with "
                "every sample"
            )
        for name in self.components:
            if not isinstance(values[name], int | float) or not math.isfinite(values[name]):
                raise ComponentError(
                    f"algorithm.gdpo_reward_keys: the reward function returned {name}={values[name]!r:.80}; a "
                    "component must be a finite number"
                )
        return score, {**extra, **{name: float(values[name]) for name in self.components}}


def make_manager(config: RewardConfig, components: Iterable[str] = ()) -> RewardManager:
    """Build the manager of a `reward` section.

    Args:
        config: its `reward_manager.name` and `reward_kwargs`.
        components: names that `gdpo` requires from every sample.

    Raises:
        NotImplementedError: the manager is not supported yet.
        ValueError: unknown manager, or invalid keywords.
    """
    # Imported here, because the worker processes import this package too and need no configuration.
    from verl.config import names
    from verl.config.reward_kwargs import overlong_buffer
    from verl.workers.reward_manager.registry import REWARD_MANAGERS

    name = config.reward_manager.name
    # A manager of the user computes the reward from the score itself.
    if name == "naive" or name in REWARD_MANAGERS.names():
        return NaiveManager()
    if name == "dapo":
        return DapoManager(overlong_buffer(config))
    if name == "gdpo":
        return GdpoManager(tuple(components))
    known = f"use one of {', '.join(names.REWARD_MANAGERS)}"
    if name in names.UNSUPPORTED_REWARD_MANAGERS:
        raise NotImplementedError(f"reward.reward_manager.name={name} is not supported yet; {known}")
    raise ValueError(f"reward.reward_manager.name={name} is unknown; {known}")
