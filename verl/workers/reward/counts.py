"""Metrics of the scoring in a step or a validation, and the check that it did not fail completely."""

from __future__ import annotations

from collections.abc import Sequence

from verl.workers.reward.loop import RewardResult
from verl.workers.reward.pool import RewardError


def reward_metrics(results: Sequence[RewardResult]) -> dict[str, float]:
    """Return the counts of failed and timed-out samples, and the seconds per sample."""
    seconds = [result.seconds for result in results]
    return {
        "reward/num_errors": float(_errors(results)),
        "reward/num_timeouts": float(_timeouts(results)),
        "reward/seconds_mean": sum(seconds) / max(len(seconds), 1),
        "reward/seconds_max": max(seconds, default=0.0),
    }


def check_scored(results: Sequence[RewardResult], scorer: str) -> None:
    """Raise RewardError if there are results and scoring failed for every one of them.

    Args:
        scorer: `RewardLoop.scorer`, for the message.
    """
    errors, timeouts = _errors(results), _timeouts(results)
    if not results or errors + timeouts < len(results):
        return
    raise RewardError(
        f"scoring failed for all {len(results)} samples of this step ({errors} errors, {timeouts} timeouts) with "
        f"{scorer}; the first: {results[0].detail}"
    )


def _errors(results: Sequence[RewardResult]) -> int:
    return sum(result.error in ("exception", "bad_return") for result in results)


def _timeouts(results: Sequence[RewardResult]) -> int:
    return sum(result.error == "timeout" for result in results)
