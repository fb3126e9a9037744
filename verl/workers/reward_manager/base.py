"""Base class of the user's reward managers."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from verl.config import PPOConfig
    from verl.protocol import DataProto


class RewardManagerBase(ABC):
    """Turns a finished sample into a reward. The driver constructs one manager per run.

    Args:
        config: the whole config.
        tokenizer: the model's tokenizer.
        compute_score: `await compute_score(data_source=..., solution_str=..., ground_truth=..., extra_info=...)` runs
            the configured scorer in a reward worker and returns its value. It raises if the scoring fails.

    Attributes:
        loop: the event loop of the managers.
    """

    uncalled_methods: ClassVar[Mapping[str, str]] = {
        "assemble_rm_scores": "leave it out; the reward is placed at the last token of the model",
    }

    def __init__(self, config: PPOConfig, tokenizer: Any, compute_score: Callable[..., Awaitable[Any]]):
        self.config = config
        self.tokenizer = tokenizer
        self.compute_score = compute_score
        self.init_class(config, tokenizer)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    @classmethod  # noqa: B027  (a subclass may override it, but need not)
    def init_class(cls, config: PPOConfig, tokenizer: Any) -> None:
        """Prepare what all instances share; called by `__init__`."""

    @abstractmethod
    async def run_single(self, data: DataProto) -> dict[str, Any]:
        """Return the reward of one sample, within `reward.timeout` seconds, without the time of `compute_score`.

        Args:
            data: a table of one row: the tensor columns of `verl.agent_loop.generation.to_batch` without scores, and
                the columns of the data as object arrays; `extra_info` also holds the extra fields of the agent loop
                and `num_turns`.

        Returns:
            `reward_score`, a finite number, and optionally `reward_extra_info`, a dict of plain values.
        """
