"""Division of a batch among the trainer ranks, on the driver: pure functions.

The mini-batches depend only on the order of the samples, not on the number of ranks. Each shard carries the
denominators of its whole mini-batch, so the loss does not depend on the division.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from verl.protocol import DataProto
from verl.utils.sampling_masks import COLUMN as SAMPLING_MASKS
from verl.utils.seqlen_balancing import balanced_partition

FORWARD_COLUMNS = ("input_ids", "attention_mask", "responses", "response_mask")
# Columns of a forward pass of the policy. The reference model and the critic do not know the sampler.
POLICY_COLUMNS = (*FORWARD_COLUMNS, SAMPLING_MASKS)
ACTOR_COLUMNS = (
    *POLICY_COLUMNS,
    "old_log_probs",
    "ref_log_prob",
    "teacher_log_probs",
    "advantages",
    "rollout_is_weights",
)
CRITIC_COLUMNS = (*FORWARD_COLUMNS, "values", "returns")


def split_mini_batches(
    data: DataProto,
    mini_batch_size_samples: int,
    dp_size: int,
    *,
    columns: tuple[str, ...] = ACTOR_COLUMNS,
    balance: bool = True,
    loss_scale_factor: float | None = None,
) -> list[list[DataProto]]:
    """Divide a batch into mini-batches of consecutive samples, and each mini-batch among the ranks.

    Args:
        data: a whole batch.
        mini_batch_size_samples: samples in a mini-batch over all ranks; the last mini-batch may be smaller.
        dp_size: number of ranks.
        columns: columns of the update besides `uid`; names that `data` lacks are ignored.
        balance: give all ranks about the same number of tokens; otherwise consecutive samples.
        loss_scale_factor: divisor of `seq-mean-token-sum-norm` in tokens; None for the padded response width.

    Returns:
        By rank, the shard of each mini-batch, with the column `sample_index` [b] int64: index of each sample in `data`.
        `meta_info` holds, for the whole mini-batch, `batch_num_tokens` (response tokens), `global_batch_size`
        (sequences with a response token) and `loss_scale_factor`.

    Raises:
        ValueError: `mini_batch_size_samples` is below 1.
    """
    if mini_batch_size_samples < 1:
        raise ValueError(f"mini_batch_size_samples={mini_batch_size_samples}: must be at least 1")
    data = _select(data, columns)
    data = data.union(DataProto.from_dict(tensors={"sample_index": torch.arange(len(data))}))
    ranks: list[list[DataProto]] = [[] for _ in range(dp_size)]
    for start in range(0, len(data), mini_batch_size_samples):
        mini_batch = data[start : start + mini_batch_size_samples]
        tokens = mini_batch.batch["response_mask"].bool().sum(dim=-1)
        width = mini_batch.batch["response_mask"].shape[-1]
        denominators = {
            "batch_num_tokens": int(tokens.sum()),
            "global_batch_size": int((tokens > 0).sum()),
            "loss_scale_factor": width if loss_scale_factor is None else loss_scale_factor,
        }
        for rank, part in enumerate(partition(mini_batch, dp_size, balance)):
            shard = mini_batch[part]
            shard.meta_info = {**data.meta_info, **denominators}
            ranks[rank].append(shard)
    return ranks


def split_even(
    data: DataProto,
    dp_size: int,
    balance: bool = True,
    parts: Sequence[np.ndarray] | None = None,
    *,
    columns: tuple[str, ...] = FORWARD_COLUMNS,
) -> tuple[list[DataProto], np.ndarray]:
    """Divide a batch among the ranks for a forward pass.

    Args:
        data: a whole batch.
        dp_size: number of ranks.
        balance: give all ranks about the same number of tokens; otherwise consecutive samples.
        parts: row numbers [b] of each rank; None to choose them here.
        columns: columns of the pass besides `uid`; names that `data` lacks are ignored.

    Returns:
        The shards with these columns, and `inverse_order` [B] int64:
        `DataProto.concat(results)[inverse_order]` is in the order of `data`.
    """
    parts = partition(data, dp_size, balance) if parts is None else parts
    data = _select(data, columns)
    return [data[part] for part in parts], np.argsort(np.concatenate(parts), kind="stable")


def partition(data: DataProto, dp_size: int, balance: bool) -> list[np.ndarray]:
    """Return the row numbers [b] int64 of each rank; their counts differ by at most one."""
    if dp_size == 1 or not balance:
        return np.array_split(np.arange(len(data), dtype=np.int64), dp_size)
    lengths = data.batch["attention_mask"].sum(dim=-1).tolist()
    return [np.asarray(part, dtype=np.int64) for part in balanced_partition(lengths, dp_size, equal_size=True)]


def _select(data: DataProto, columns: tuple[str, ...]) -> DataProto:
    return data.select(
        batch_keys=[name for name in columns if name in data.batch.keys()],  # noqa: SIM118 (a TensorDict iterates its rows)
        non_tensor_batch_keys=[name for name in ("uid", *columns) if name in data.non_tensor_batch],
    )
