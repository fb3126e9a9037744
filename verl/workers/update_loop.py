"""The update of actor and critic: optimizer steps over mini-batches, and the denominators of their losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from verl.algorithms.aggregation import LossDenominators
from verl.protocol import DataProto
from verl.utils.profiler import profile_mark
from verl.workers.engine.base import TrainEngine


def loss_denominators(meta_info: dict[str, Any]) -> LossDenominators:
    """Return the denominators in the meta_info of a mini-batch."""
    return {
        "dp_size": 1,
        "batch_num_tokens": meta_info["batch_num_tokens"],
        "global_batch_size": meta_info["global_batch_size"],
        "loss_scale_factor": meta_info["loss_scale_factor"],
    }


def run_updates(
    engine: TrainEngine,
    mini_batches: Sequence[DataProto],
    forward_backward: Callable[[int, int, DataProto], dict[str, float]],
    *,
    epochs: int,
    prefix: str,
    loss_name: str,
) -> dict[str, float]:
    """Take one optimizer step per mini-batch, `epochs` times, then advance the schedule by one training step.

    Args:
        forward_backward: accumulates the gradient of a mini-batch and returns the engine's metrics; its arguments are
            the epoch, the number of the mini-batch, and the mini-batch.
        prefix: prefix of the metrics, `actor` or `critic`.
        loss_name: name of the engine's metric `loss`.

    Returns:
        metrics, averaged over the optimizer steps that have them.

    Raises:
        NonFiniteError: loss or gradient is NaN or infinite; raised on all ranks before the optimizer step.
    """
    history: list[dict[str, float]] = []
    for epoch in range(epochs):
        for number, mini_batch in enumerate(mini_batches):
            with profile_mark(f"mini_batch{number}"):
                metrics = forward_backward(epoch, number, mini_batch)
                step = engine.optimizer_step()
            metrics[loss_name] = metrics.pop("loss")
            metrics[f"{prefix}/perf/padding_fraction"] = metrics.pop("padding_fraction")
            metrics[f"{prefix}/grad_norm"], metrics[f"{prefix}/lr"] = step["grad_norm"], step["lr"]
            history.append(metrics)
    engine.schedule_step()
    names = dict.fromkeys(name for metrics in history for name in metrics)
    values = {name: [metrics[name] for metrics in history if name in metrics] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}
