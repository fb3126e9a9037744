"""OPO against a loop over Python floats."""

import math

from algorithms.advantages import loops

from verl.algorithms.advantages.opo import compute_opo_outcome_advantage


def test_opo_equals_the_loop(batch):
    totals, lengths = loops.total_rewards(batch.token_level_rewards), [sum(row) for row in batch.response_mask.tolist()]
    scores = []
    for i, total in enumerate(totals):
        group = loops.group_of(batch.index, i)
        whole = sum(lengths[j] for j in group)
        weighted = math.fsum(lengths[j] * totals[j] for j in group) / whole if whole else 0.0
        scores.append(total if len(group) == 1 else total - weighted)
    result = compute_opo_outcome_advantage(batch.token_level_rewards, batch.response_mask, batch.index)
    loops.check_outcome(result, loops.on_tokens(scores, batch.response_mask))
