"""Metrics of a fully asynchronous run, under the names of upstream verl."""

from __future__ import annotations

from collections.abc import Mapping

from verl.protocol import DataProto


class AsyncCounts:
    """Counts of the stale samples that this process trained on; a resumed run counts from 0."""

    def __init__(self) -> None:
        self._stale_samples = self._stale_prompts = 0

    def metrics(self, batch: DataProto, version: int) -> dict[str, float]:
        """Count the samples of a step.

        A sample is stale if all its tokens are older than the weights that the step starts with.

        Args:
            batch: `weight_versions` [B, T] int64, -1 at positions without a model token; `uid` [B] of the prompt.
            version: version of the weights that the step starts with.

        Returns:
            `fully_async/count/current_param_version`; `fully_async/count/stale_{trajectory,samples}_processed`, stale
            samples and prompts with a stale sample so far; `fully_async/partial/{total_partial_num,partial_ratio,
            max_partial_span}`, samples of this step that several versions generated, their fraction, and the largest
            number of updates between the first and the last token of one.
        """
        versions = batch.batch["weight_versions"]
        nonempty = (versions >= 0).any(dim=-1)
        newest = versions.amax(dim=-1)
        oldest = versions.masked_fill(versions < 0, version + 1).amin(dim=-1)
        stale = nonempty & (newest < version)
        span = (newest - oldest)[nonempty]
        self._stale_samples += int(stale.sum())
        self._stale_prompts += len(set(batch.non_tensor_batch["uid"][stale.numpy()]))
        partial = int((span > 0).sum())
        return {
            "fully_async/count/current_param_version": float(version),
            "fully_async/count/stale_trajectory_processed": float(self._stale_samples),
            "fully_async/count/stale_samples_processed": float(self._stale_prompts),
            "fully_async/partial/total_partial_num": float(partial),
            "fully_async/partial/partial_ratio": partial / max(1, len(versions)),
            "fully_async/partial/max_partial_span": float(span.max()) if len(span) else 0.0,
        }


def idle_metrics(timing: Mapping[str, float]) -> dict[str, float]:
    """Return the fractions of a step in which one side only waited for the other.

    Args:
        timing: seconds by stage: `step`, `wait_for_rollout` and `wait_for_trainer`.

    Returns:
        `fully_async/trainer/idle_ratio`; `fully_async/rollouter/{idle_ratio,active_time,version_time}`, times in
        seconds.
    """
    seconds, idle = timing["step"], min(timing.get("wait_for_trainer", 0.0), timing["step"])
    return {
        "fully_async/trainer/idle_ratio": timing.get("wait_for_rollout", 0.0) / max(seconds, 1e-9),
        "fully_async/rollouter/idle_ratio": idle / max(seconds, 1e-9),
        "fully_async/rollouter/active_time": seconds - idle,
        "fully_async/rollouter/version_time": seconds,
    }
