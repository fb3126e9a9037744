"""Base class of reward managers in the form of earlier versions of upstream verl."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

    from verl.protocol import DataProto


class AbstractRewardManager(ABC):
    """Turns finished samples into rewards. Called with one sample, in a thread of its own.

    Args:
        tokenizer: the model's tokenizer.
        num_examine: 0; samples to print, which the console backend does.
        compute_score: runs the configured scorer in a reward worker and returns its value, with the keywords
            `data_source`, `solution_str`, `ground_truth`, `extra_info`. It raises if the scoring fails.
        reward_fn_key: `data_source`, the column of the sources in the table.
        kwargs: `max_resp_len` and `overlong_buffer_cfg` of `reward.reward_kwargs`, if they are set.
    """

    uncalled_methods: ClassVar[Mapping[str, str]] = {
        "_extract_reward_from_rm_scores": "leave it out; there is no reward model inside a run",
    }

    @abstractmethod
    def __init__(
        self,
        tokenizer: Any,
        num_examine: int,
        compute_score: Callable[..., Any] | None,
        reward_fn_key: str = "data_source",
        **kwargs: Any,
    ):
        """Store the arguments."""

    @abstractmethod
    def __call__(self, data: DataProto, return_dict: bool = False) -> torch.Tensor | dict[str, Any]:
        """Return the rewards of the samples, within `reward.timeout` seconds, without the time of `compute_score`.

        Args:
            data: as for `RewardManagerBase.run_single`.
            return_dict: True.

        Returns:
            the rewards, [B, T] float, not 0 at one token of a sample at most; with `return_dict` as `reward_tensor` in
            a dict with `reward_extra_info`, lists of B values by name.
        """
