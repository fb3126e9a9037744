"""GPG advantages against a loop over Python floats."""

import numpy as np
import pytest
import torch
from algorithms.advantages import loops

from verl.algorithms.advantages.gpg import compute_gpg_outcome_advantage


@pytest.mark.parametrize("f_norm", [1.0, 2.5])
def test_gpg_equals_the_loop(batch, f_norm):
    batch.token_level_rewards[[0, 1, 5]] = 0.0
    totals = loops.total_rewards(batch.token_level_rewards)
    alpha = len(totals) / sum(total != 0 for total in totals)
    scores = [alpha * score / f_norm for score in loops.normalized_scores(totals, batch.index, by_std=False)]
    result = compute_gpg_outcome_advantage(batch.token_level_rewards, batch.response_mask, batch.index, f_norm=f_norm)
    loops.check_outcome(result, loops.on_tokens(scores, batch.response_mask))


def test_gpg_of_zero_rewards_is_0():
    advantages, _ = compute_gpg_outcome_advantage(torch.zeros(3, 2), torch.ones(3, 2), np.array(["a"] * 3))
    assert advantages.tolist() == [[0.0] * 2] * 3
