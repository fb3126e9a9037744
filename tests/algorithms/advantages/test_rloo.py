"""RLOO against a loop over Python floats."""

import statistics

from algorithms.advantages import loops

from verl.algorithms.advantages.rloo import compute_rloo_outcome_advantage, compute_rloo_vectorized_outcome_advantage


def rloo(batch, alone):
    """R minus the mean of the others; `alone(R)` in a group of one."""
    totals, scores = loops.total_rewards(batch.token_level_rewards), []
    for i, total in enumerate(totals):
        others = [totals[j] for j in loops.others_of(batch.index, i)]
        scores.append(total - statistics.fmean(others) if others else alone(total))
    return loops.on_tokens(scores, batch.response_mask)


def test_rloo_equals_the_loop(batch):
    result = compute_rloo_outcome_advantage(batch.token_level_rewards, batch.response_mask, batch.index)
    loops.check_outcome(result, rloo(batch, alone=lambda total: total))


def test_rloo_vectorized_gives_0_to_a_group_of_one(batch):
    result = compute_rloo_vectorized_outcome_advantage(batch.token_level_rewards, batch.response_mask, batch.index)
    loops.check_outcome(result, rloo(batch, alone=lambda total: 0.0))
