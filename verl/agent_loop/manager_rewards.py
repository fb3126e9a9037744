"""Rewards from a reward manager of the user (`reward.reward_manager.name`)."""

from __future__ import annotations

import asyncio
import time
import traceback
from typing import Any

import torch

from verl.agent_loop.manager_calls import ManagerCalls, ManagerTimeoutError
from verl.config import PPOConfig
from verl.config.reward import MANAGER_KWARGS
from verl.protocol import DataProto
from verl.workers.reward import RewardError, RewardLoop, RewardResult
from verl.workers.reward.function import ARGUMENTS, BadReturnError, plain, read_return
from verl.workers.reward_manager import AbstractRewardManager, RewardManagerBase, get_reward_manager_cls


class ScoringFailedError(Exception):
    """The configured scorer failed for the sample that a manager asked about.

    Attributes:
        result: of the scorer.
    """

    def __init__(self, result: RewardResult):
        super().__init__(result.detail)
        self.result = result


class ManagerRewards:
    """Scores samples with the manager of the user that the config names.

    Args:
        config: the whole config.
        tokenizer: the model's tokenizer.
        rewards: the configured scorer, which the manager may call.

    Raises:
        ValueError: no manager has the name, or its constructor fails.
    """

    def __init__(self, config: PPOConfig, tokenizer: Any, rewards: RewardLoop):
        self._rewards = rewards
        self._name = config.reward.reward_manager.name
        self._timeout = config.reward.time_limit
        self._calls = ManagerCalls(self._timeout)
        self._loop: asyncio.AbstractEventLoop | None = None
        cls = get_reward_manager_cls(self._name)
        kwargs = {key: value for key, value in (config.reward.reward_kwargs or {}).items() if key in MANAGER_KWARGS}
        try:
            self._manager: RewardManagerBase | AbstractRewardManager = (
                cls(config=config, tokenizer=tokenizer, compute_score=self._compute_score)
                if issubclass(cls, RewardManagerBase)
                else cls(tokenizer=tokenizer, num_examine=0, compute_score=self._compute_score_in_thread, **kwargs)
            )
        except Exception as error:  # a user's __init__ may raise anything
            raise ValueError(
                f"reward.reward_manager.name={self._name}: {cls.__qualname__} cannot be constructed: "
                f"{type(error).__name__}: {error}"
            ) from error

    async def score(self, data: DataProto) -> RewardResult:
        """Return the reward of a table of one sample; an error of the manager becomes an error of the sample."""
        started = time.perf_counter()

        def failed(error: str, detail: str) -> RewardResult:
            return RewardResult(0.0, {}, error, time.perf_counter() - started, detail)

        try:
            manager, self._loop = self._manager, asyncio.get_running_loop()
            if isinstance(manager, RewardManagerBase):
                run_single = manager.run_single
                value, extra = _single(await self._calls.run_coroutine(lambda: run_single(data)))
            else:
                value, extra = _from_tensor(await self._calls.run_in_thread(lambda: manager(data, return_dict=True)))
            score, others, note = read_return({**extra, "score": value})
            extras = {**others, **({"score": plain(extra["score"], "score")} if "score" in extra else {})}
            return RewardResult(score, extras, None, time.perf_counter() - started, note)
        except ScoringFailedError as error:
            return error.result
        except ManagerTimeoutError:
            return failed("timeout", f"{self._name}: no reward within reward.timeout={self._timeout:g} s")
        except BadReturnError as error:
            return failed("bad_return", f"{self._name}: {error}")
        except RewardError:
            raise
        except Exception:  # noqa: BLE001  (counted as `reward/num_errors`; a step where every sample fails ends the run)
            return failed("exception", traceback.format_exc())

    async def _compute_score(self, *args: Any, **kwargs: Any) -> Any:
        """Run the configured scorer, and return what it returned.

        Raises:
            ScoringFailedError: it failed.
            TypeError: other arguments.
        """
        arguments = {"extra_info": None, **dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
        if len(args) > len(ARGUMENTS) or arguments.keys() != set(ARGUMENTS):
            raise TypeError(
                f"compute_score takes {', '.join(ARGUMENTS)}, not {', '.join(arguments)}; set further keywords in "
                "reward.reward_kwargs"
            )
        with self._calls.waiting():
            result = await self._rewards.score(**arguments)
        if result.error is not None:
            raise ScoringFailedError(result)
        return result.score if result.extra == {"acc": result.score} else {**result.extra, "score": result.score}

    def _compute_score_in_thread(self, *args: Any, **kwargs: Any) -> Any:
        assert self._loop is not None, "set by `score`"
        return asyncio.run_coroutine_threadsafe(self._compute_score(*args, **kwargs), self._loop).result()


def _single(returned: Any) -> tuple[Any, dict[str, Any]]:
    """Return reward and extra values of `run_single`.

    Raises:
        BadReturnError: it returned another form.
    """
    if not isinstance(returned, dict) or "reward_score" not in returned:
        raise BadReturnError(f"run_single returned {str(returned)[:80]}; return a dict with reward_score")
    return returned["reward_score"], dict(returned.get("reward_extra_info") or {})


def _from_tensor(returned: Any) -> tuple[Any, dict[str, Any]]:
    """Return reward and extra values of `AbstractRewardManager.__call__` for a table of one sample.

    Raises:
        BadReturnError: it returned another form, or rewards at several tokens.
    """
    tensor: Any = returned
    extra: dict[str, Any] = {}
    if isinstance(returned, dict):
        tensor, extra = returned.get("reward_tensor"), returned.get("reward_extra_info") or {}
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2 or len(tensor) != 1:
        raise BadReturnError(
            f"the reward manager returned {str(returned)[:80]}; return a tensor [1, T], or a dict with reward_tensor"
        )
    if int((tensor != 0).sum()) > 1:
        raise BadReturnError("the reward manager gave rewards to several tokens of a sample; give one at one token")
    return tensor.sum().item(), {name: values[0] for name, values in extra.items()}
