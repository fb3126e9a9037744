"""Reference arithmetic of the estimators: loops over Python floats, and the comparison with a result."""

import math
import statistics

import torch


def total_rewards(rewards):
    """The reward of each sample: the sum of its row."""
    return [math.fsum(row) for row in rewards.tolist()]


def group_of(index, i):
    """The samples in the group of sample i, itself included."""
    return [j for j in range(len(index)) if index[j] == index[i]]


def others_of(index, i):
    """The other samples in the group of sample i."""
    return [j for j in range(len(index)) if index[j] == index[i] and j != i]


def normalized_scores(totals, index, by_std=True):
    """(R - mean) / (std + 1e-6) per sample, or R - mean; a group of one has mean 0 and std 1."""
    scores = []
    for i, total in enumerate(totals):
        group = [totals[j] for j in group_of(index, i)]
        if len(group) == 1:
            scores.append(total / (1 + 1e-6) if by_std else total)
        else:
            centered = total - statistics.fmean(group)
            scores.append(centered / (statistics.stdev(group) + 1e-6) if by_std else centered)
    return scores


def on_tokens(scores, mask):
    """A score per sample at each of its tokens, 0 outside the mask."""
    rows = [[s if m else 0.0 for m in row] for s, row in zip(scores, mask.tolist(), strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


def whitened_rows(rows, mask):
    """Rows of values, whitened over the tokens of the mask, 0 outside."""
    chosen = [v for row, ms in zip(rows, mask.tolist(), strict=True) for v, m in zip(row, ms, strict=True) if m]
    mean, variance = statistics.fmean(chosen), statistics.variance(chosen)
    return torch.tensor(
        [
            [(v - mean) / math.sqrt(variance + 1e-8) if m else 0.0 for v, m in zip(row, ms, strict=True)]
            for row, ms in zip(rows, mask.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )


def check_outcome(result, expected):
    """Compare an estimator whose returns are its advantages, in another tensor."""
    advantages, returns = result
    assert advantages.dtype == returns.dtype == torch.float32
    torch.testing.assert_close(advantages.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(advantages, returns)
    assert advantages.data_ptr() != returns.data_ptr()


def token_columns(mask):
    """For each sample, the columns of its tokens."""
    return [[t for t, m in enumerate(row) if m] for row in mask.tolist()]


def filled(shape, values):
    """A float64 tensor with `values` {(row, column): value}, 0 elsewhere."""
    rows = torch.zeros(shape, dtype=torch.float64)
    for (i, t), value in values.items():
        rows[i, t] = value
    return rows


def whitened(values):
    """`values` {(row, column): value}, whitened."""
    mean, variance = statistics.fmean(values.values()), statistics.variance(values.values())
    return {key: (value - mean) / math.sqrt(variance + 1e-8) for key, value in values.items()}


def rewards_to_go(batch):
    """{(row, column): sum of the rewards at this token of the mask and the later ones}."""
    rewards = batch.token_level_rewards.tolist()
    return {
        (i, t): math.fsum(rewards[i][later] for later in columns[k:])
        for i, columns in enumerate(token_columns(batch.response_mask))
        for k, t in enumerate(columns)
    }


def check_tokens(result, advantages, returns):
    """Compare an estimator with advantages and returns per token."""
    assert result[0].dtype == result[1].dtype == torch.float32
    torch.testing.assert_close(result[0].double(), advantages, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result[1].double(), returns, rtol=1e-5, atol=1e-6)
