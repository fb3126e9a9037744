"""A batch of edge cases for all estimators, and the section that they read."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

CONFIG = dict(
    gamma=0.9,
    lam=0.8,
    norm_adv_by_std_in_grpo=True,
    gdpo_reward_keys=["accuracy", "format"],
    gdpo_reward_weights=[1.0, 0.5],
)


@pytest.fixture
def config():
    return SimpleNamespace(**CONFIG)


@pytest.fixture
def batch():
    """15 samples of 8 columns.

    Ragged masks with gaps; groups of 4, 3, 2 and 1; empty responses in groups with others, and a group of empty
    responses; a group of equal rewards; rewards outside the mask; NaN where no estimator may read.
    """
    generator = torch.Generator().manual_seed(7)
    index = np.array(list("abacbaefbadddfe"), dtype=object)
    index[3] = "lonely"
    size, width = len(index), 8
    lengths = [8, 5, 3, 6, 0, 7, 2, 0, 4, 8, 5, 1, 6, 0, 0]
    mask = (torch.rand(size, width, generator=generator) > 0.3).long()
    for row, length in zip(mask, lengths, strict=True):
        row[length:] = 0
        row[: min(length, 1)] = 1
    rewards = torch.randn(size, width, generator=generator)
    flat = [i for i, uid in enumerate(index) if uid == "d"]
    rewards[flat] = 0.0
    rewards[flat, 7] = 0.1
    log_probs = torch.log(torch.rand(size, width, generator=generator).clamp(min=1e-3))
    nan_off_mask = torch.where(mask.bool(), 0.0, torch.nan)
    nan_off_mask[::2] = 0.0  # values outside the mask may also look valid
    tensors = {
        "token_level_rewards": rewards,
        "response_mask": mask,
        "values": torch.randn(size, width, generator=generator) + nan_off_mask,
        "reward_baselines": torch.randn(size, generator=generator),
        "old_log_probs": log_probs + nan_off_mask,
        "sum_pi_squared": torch.rand(size, width, generator=generator).clamp(min=0.01) + nan_off_mask,
        "rollout_is_weights": torch.rand(size, width, generator=generator) * 2 + nan_off_mask,
    }
    non_tensors = {
        "accuracy": np.array(torch.randn(size, generator=generator).tolist(), dtype=object),
        "format": np.array((100 * torch.rand(size, generator=generator)).tolist(), dtype=object),
    }
    non_tensors["accuracy"][flat] = 0.1
    non_tensors["format"][flat] = 1
    non_tensors["format"][1] = None
    return SimpleNamespace(tensors=tensors, non_tensors=non_tensors, index=index, **tensors)
