"""The reward loop: `await loop.score(...)` for each sample as it finishes.

If a scorer raises, hangs or returns no score, its sample gets 0.0 and an error.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import threading
import weakref
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from verl.timeline.spans import current_timeline
from verl.utils.heartbeat import current_beacon
from verl.workers.reward.function import KWARGS_KEY, RewardFunctionError, check_path
from verl.workers.reward.managers import ComponentError, make_manager
from verl.workers.reward.pool import Outcome, RewardError, WorkerPool
from verl.workers.reward.worker import RewardModelAccess, Setup

if TYPE_CHECKING:
    from verl.config import RewardConfig

_LOG = logging.getLogger(__name__)

RESERVED_NAMES = frozenset(
    (
        # files of samples and tables
        *("input", "output", "gts", "step", "uid"),
        # the variable of the metrics that is the reward itself
        "reward",
        # columns of the batch: of the rows, of the samples, of the later stages, of agent loops
        *("data_source", "reward_model", "extra_info", "index", "raw_prompt", "stop_reason", "num_turns"),
        *(
            "reward_error",
            "prompts",
            "responses",
            "input_ids",
            "attention_mask",
            "position_ids",
            "response_mask",
            "weight_versions",
            "sampling_masks",
        ),
        *("token_level_scores", "rollout_log_probs", "reward_baselines", "old_log_probs", "entropys", "sum_pi_squared"),
        *("ref_log_prob", "values", "rollout_is_weights", "accepted_mask", "token_level_rewards", "advantages"),
        *("returns", "sample_index", "selected_tokens", "recomputed_samples"),
        *("tool_rewards", "rollout_reward_scores", "tool_call_counts", "tool_failures", "tool_seconds"),
    )
)
"""Names that an extra value of a reward function must not have; such a value is renamed by `renamed_extra`."""


def renamed_extra(name: str, taken: Container[str]) -> str:
    """Return `extra_<name>`, with more of the prefix while that name is taken too."""
    name = f"extra_{name}"
    return renamed_extra(name, taken) if name in taken else name


@dataclass(frozen=True)
class RewardResult:
    """The reward of one sample.

    Attributes:
        score: reward that the manager computed from the function's score; finite, 0.0 if `error` is set.
        extra: other values that the function returned, as built-in types, and values that the manager added; empty if
            `error` is set. A function that returns a plain number gives `{"acc": score}`.
        error: None, "exception", "timeout" or "bad_return".
        seconds: time of the scoring, without the wait for a free worker.
        detail: traceback or reason of the error.
    """

    score: float
    extra: dict[str, Any]
    error: str | None
    seconds: float
    detail: str = ""


class RewardLoop:
    """Scores samples in worker processes, for callers on any asyncio event loop, without blocking it.

    A plain function scores one sample at a time per worker. An async function runs on an event loop in each worker, up
    to 256 samples at once; its module variables (a semaphore, a session) exist once per worker.

    Args:
        config: the `reward` section: `custom_reward_function.path` (null: the built-in scorers), `.name` and
            `.reward_kwargs`, `reward_kwargs` (keywords of the manager; others go to the scorer too), `num_workers`
            (null: one per core, at most 8), `timeout` (seconds per sample, from the start of its scoring),
            `reward_manager.name`.
        num_workers: overrides `config.num_workers`.
        components: `algorithm.gdpo_reward_keys`, which the gdpo manager requires from every sample.
        data_sources: built-in scorers to import at the start of the workers instead of at their first sample; a source
            without a built-in scorer is reported at once. Unused with a user's function.
        reward_router_address: address of the reward model (`host:port`) of `config.reward_model`; it need not respond
            before the first sample. None without a reward model.

    Raises:
        RewardFunctionError: wrong file or name of the function, a failed import, or other arguments.
        NotImplementedError: a reward manager that is not supported yet.
        ValueError: another setting is out of range.
    """

    def __init__(
        self,
        config: RewardConfig,
        *,
        num_workers: int | None = None,
        components: Iterable[str] = (),
        data_sources: Iterable[str] = (),
        reward_router_address: str | None = None,
    ) -> None:
        from verl.config.reward_kwargs import kwargs_problems, scorer_kwargs

        components = tuple(components)
        if taken := sorted(RESERVED_NAMES & set(components)):
            raise ValueError(
                f"algorithm.gdpo_reward_keys: {', '.join(taken)} has another meaning in the batch; choose other names"
            )
        self._manager = make_manager(config, components)
        if problems := kwargs_problems(config):
            raise ValueError("; ".join(problems))
        timeout = float(config.time_limit)
        if not 0 < timeout < float("inf"):
            raise ValueError(f"reward.timeout={config.timeout}: must be a number of seconds per sample > 0")
        count = config.workers if num_workers is None else num_workers
        if count < 1:
            raise ValueError(f"reward.num_workers={count}: must be at least 1, or null for one per core (at most 8)")
        path = config.custom_reward_function.path
        self._setup = Setup(
            path=None if path is None else check_path(path),
            name=config.custom_reward_function.name or "compute_score",
            reward_kwargs=scorer_kwargs(config),
            timeout=timeout,
            data_sources=tuple(dict.fromkeys(data_sources)),
            timeline=current_timeline(),
            reward_model=_access(config, reward_router_address),
            beacon=current_beacon(),
        )
        self._lock = threading.Lock()
        self._has_failed = False
        self._notes: set[str] = set()
        try:
            pickle.dumps(self._setup)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise ValueError(f"{KWARGS_KEY} must hold plain values: {error}") from error
        self._pool = WorkerPool(self._setup, count)
        self._finalizer = weakref.finalize(self, self._pool.close)

    async def score(
        self,
        data_source: str,
        solution_str: str,
        ground_truth: Any,
        extra_info: Any,
        *,
        response_length: int | None = None,
        raw_prompt: Any = None,
    ) -> RewardResult:
        """Score one sample: wait for a free worker, then score within `timeout` seconds.

        Args:
            data_source, solution_str, ground_truth, extra_info: arguments of the scorer.
            response_length: tokens of the response; required by a manager that uses the length.
            raw_prompt: messages of the prompt; required if the reward model scores the samples.

        Raises:
            RewardError: the loop is closed, its workers cannot be restarted, or the scorer does not return a component
                that the manager requires.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Outcome] = loop.create_future()

        def resolve(outcome: Outcome | BaseException) -> None:
            if future.done():
                return
            if isinstance(outcome, BaseException):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        def deliver(outcome: Outcome | BaseException) -> None:
            try:
                loop.call_soon_threadsafe(resolve, outcome)
            except RuntimeError:
                _LOG.debug("a reward came after its event loop was closed")

        sample = (data_source, solution_str, ground_truth, extra_info)
        job = self._pool.submit((*sample, raw_prompt) if self._setup.scored_by_model else sample, deliver)
        try:
            outcome = await future
        except asyncio.CancelledError:
            job.cancelled = True
            raise
        score, extra, detail = outcome.score, outcome.extra, outcome.detail
        if outcome.error == "timeout":
            detail = f"no score within reward.timeout={self._setup.timeout:g} s"
        if outcome.error is None:
            try:
                score, extra = self._manager.reward(score, extra, response_length)
            except ComponentError as error:
                raise RewardError(f"data_source={data_source}: {error}") from error
        return self.record(RewardResult(score, extra, outcome.error, outcome.seconds, detail), data_source)

    def record(self, result: RewardResult, data_source: str) -> RewardResult:
        """Log the first failure and the notes in `detail`, and rename extra values with reserved names."""
        if result.error is not None:
            self._report(result.error, result.detail, data_source)
            return result
        self._note(result.detail)
        return replace(result, extra=self._without_reserved(result.extra), detail="")

    @property
    def scorer(self) -> str:
        """Name of the scorer for messages."""
        if self._setup.scored_by_model:
            return "the reward model"
        return self._setup.path or "the built-in scorers"

    def close(self) -> None:
        """End the worker processes and all processes that they started; may be called twice."""
        self._finalizer()

    def worker_pids(self) -> list[int]:
        """Process ids of the workers."""
        return self._pool.pids()

    def _without_reserved(self, extra: dict[str, Any]) -> dict[str, Any]:
        """Rename values whose names have another meaning in the batch, the files of samples or the metrics."""
        if not (taken := sorted(RESERVED_NAMES & extra.keys())):
            return extra
        renamed = {name: renamed_extra(name, extra) for name in taken}
        for name, other in renamed.items():
            self._note(
                f"the reward function returned the extra value '{name}', a name with another meaning; it is stored as "
                f"'{other}'. Choose another name"
            )
        return {renamed.get(name, name): value for name, value in extra.items()}

    def _note(self, text: str) -> None:
        """Log a warning once."""
        with self._lock:
            new = bool(text) and text not in self._notes
            self._notes.add(text)
        if new:
            _LOG.warning("reward: %s", text)

    def _report(self, error: str, detail: str, data_source: str) -> None:
        with self._lock:
            first, self._has_failed = not self._has_failed, True
        if first:
            _LOG.error(
                "reward: %s while scoring a sample of data_source=%s; the sample gets 0.0. Later failures are only "
                "counted (reward/num_errors, reward/num_timeouts). The first one:\n%s",
                error,
                data_source,
                detail,
            )


def _access(config: RewardConfig, address: str | None) -> RewardModelAccess | None:
    assert (address is not None) == config.reward_model.enable, "the run serves the reward model that is enabled"
    if address is None:
        return None
    assert config.reward_model.model_path is not None, "preflight checks that it is set"
    return RewardModelAccess(address, config.reward_model.model_path)


def extra_columns(results: Sequence[RewardResult]) -> dict[str, list[Any]]:
    """Return the extra values of a batch as columns, one value per sample.

    A missing value becomes 0.0 in a numeric column if the scoring of the sample failed, else None.
    """
    keys = dict.fromkeys(key for result in results for key in result.extra)
    columns: dict[str, list[Any]] = {}
    for key in keys:
        present = [result.extra[key] for result in results if key in result.extra]
        numeric = all(isinstance(value, int | float) for value in present)
        columns[key] = [
            result.extra.get(key, 0.0 if numeric and result.error is not None else None) for result in results
        ]
    return columns


__all__ = ["RewardError", "RewardFunctionError", "RewardLoop", "RewardResult", "extra_columns"]
