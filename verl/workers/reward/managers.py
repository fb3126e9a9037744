"""Reward managers (`reward.reward_manager.name`): from what the scorer returned to a sample's reward.

They run in the driver, on samples whose scoring succeeded; one whose scoring failed keeps its 0.0.
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
    """A reward function did not return a component that the run needs."""


class RewardManager(Protocol):
    """Turns a score into a reward."""

    def reward(self, score: float, extra: Extra, response_length: int | None) -> tuple[float, Extra]:
        """The reward of one sample, and its extra values.

        Args:
            score: finite, as the scorer returned it.
            extra: what the scorer returned beside it; not changed.
            response_length: tokens of the response, those of tools included; None where the caller has no tokens.
        """
        ...


class NaiveManager:
    """The score is the reward."""

    def reward(self, score: float, extra: Extra, response_length: int | None) -> tuple[float, Extra]:
        return score, extra


@dataclass(frozen=True)
class DapoManager:
    """The score less a penalty for a response that comes near the limit, or is beyond it.

    The extra value `score` is the score without the penalty; `overlong_reward` (at most 0) and `overlong` (whether
    there is a penalty) come along where the buffer's `log` is set.
    """

    buffer: OverlongBuffer | None

    def reward(self, score: float, extra: Extra, response_length: int | None) -> tuple[float, Extra]:
        """Raises ValueError where the response's length is not known."""
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
    """0 up to `max_resp_len - buffer_len` tokens, then a line that falls to `-penalty_factor` at `max_resp_len`.

    Beyond, the line goes on, as in upstream verl, where the paper (arXiv 2503.14476, equation 13) has a constant: it
    only matters where `data.max_response_length` is larger than `max_resp_len`.
    """
    excess = response_length - (buffer.max_resp_len - buffer.buffer_len)
    return min(0.0, -excess / buffer.buffer_len * buffer.penalty_factor)


@dataclass(frozen=True)
class GdpoManager:
    """The score is the reward, and every component has to be among the extra values as a finite number.

    The component `score` is the score itself.
    """

    components: tuple[str, ...]

    def reward(self, score: float, extra: Extra, response_length: int | None) -> tuple[float, Extra]:
        """Raises ComponentError naming the components that are missing or are no finite number."""
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
                    "component has to be a finite number"
                )
        return score, {**extra, **{name: float(values[name]) for name in self.components}}


def make_manager(config: RewardConfig, components: Iterable[str] = ()) -> RewardManager:
    """The manager of a `reward` section.

    Args:
        config: its `reward_manager.name` and `reward_kwargs`.
        components: names that `gdpo` asks every sample for.

    Raises:
        NotImplementedError: a manager that is known and not supported yet.
        ValueError: an unknown manager, or keywords that it cannot work with.
    """
    # Here, so that the worker processes, which import this package too, need not load the configuration.
    from verl.config import names
    from verl.config.reward_kwargs import overlong_buffer

    name = config.reward_manager.name
    if name == "naive":
        return NaiveManager()
    if name == "dapo":
        return DapoManager(overlong_buffer(config))
    if name == "gdpo":
        return GdpoManager(tuple(components))
    known = f"use one of {', '.join(names.REWARD_MANAGERS)}"
    if name in names.UNSUPPORTED_REWARD_MANAGERS:
        raise NotImplementedError(f"reward.reward_manager.name={name} is not supported yet; {known}")
    raise ValueError(f"reward.reward_manager.name={name} is unknown; {known}")
