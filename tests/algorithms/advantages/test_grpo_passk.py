"""GRPO pass@k advantages against a loop over Python floats."""

import statistics

import pytest
from algorithms.advantages import loops

from verl.algorithms.advantages.grpo_passk import compute_grpo_passk_outcome_advantage


@pytest.mark.parametrize("by_std", [True, False])
def test_grpo_passk_equals_the_loop(batch, config, by_std):
    batch.token_level_rewards[1] += 9  # two samples share the best reward of group b
    batch.token_level_rewards[8] = batch.token_level_rewards[1]
    totals, scores = loops.total_rewards(batch.token_level_rewards), []
    for i, total in enumerate(totals):
        others = [totals[j] for j in loops.others_of(batch.index, i)]
        lead = total - max(others) if others and total > max(others) else 0.0
        std = statistics.stdev([total, *others]) + 1e-6 if by_std and others else 1.0
        scores.append(lead / std)
    assert scores[1] == scores[8] == 0.0
    assert sum(score > 0.1 and row.any() for score, row in zip(scores, batch.response_mask, strict=True)) == 2
    config.norm_adv_by_std_in_grpo = by_std
    result = compute_grpo_passk_outcome_advantage(
        batch.token_level_rewards, batch.response_mask, batch.index, config=config
    )
    loops.check_outcome(result, loops.on_tokens(scores, batch.response_mask))
