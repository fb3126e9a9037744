"""Metrics of a step, with upstream verl's names and arguments; `verl.trainer.ppo.metrics` has the implementation."""

from __future__ import annotations

from collections.abc import Mapping

from verl.protocol import DataProto
from verl.trainer.ppo import metrics
from verl.trainer.ppo.metrics import compute_timing_metrics, compute_variance_proxy_metrics
from verl.trainer.ppo.validation import process_validation_metrics
from verl.utils.metric import reduce_metrics

__all__ = [
    "compute_data_metrics",
    "compute_throughout_metrics",
    "compute_timing_metrics",
    "compute_variance_proxy_metrics",
    "process_validation_metrics",
    "reduce_metrics",
]


def compute_data_metrics(batch: DataProto, use_critic: bool = True) -> dict[str, float]:
    """Return the metrics of `metrics.compute_data_metrics`; the limits are the padded widths of this batch.

    Args:
        batch: the columns that `metrics.compute_data_metrics` reads.
        use_critic: also return the metrics of the column `values`.

    Raises:
        ValueError: `use_critic` without the column `values`.
    """
    if use_critic and "values" not in batch.batch:
        raise ValueError("compute_data_metrics: the batch has no column values; pass use_critic=False")
    response_width = batch.batch["responses"].shape[-1]
    prompt_width = batch.batch["attention_mask"].shape[-1] - response_width
    keys = [str(key) for key in batch.batch.keys() if use_critic or key != "values"]  # noqa: SIM118
    return metrics.compute_data_metrics(batch.select(batch_keys=keys), prompt_width, response_width)


def compute_throughout_metrics(batch: DataProto, timing_raw: Mapping[str, float], n_gpus: int) -> dict[str, float]:
    """Return `perf/{total_num_tokens,time_per_step,throughput}`; see `metrics.compute_throughput_metrics`.

    Args:
        batch: column attention_mask [B, P + T].
        timing_raw: seconds by stage name; `step` is the whole step.
        n_gpus: number of devices of the trainer.
    """
    return metrics.compute_throughput_metrics(batch, timing_raw, n_gpus)
