"""ReMax against a loop over Python floats."""

from algorithms.advantages import loops

from verl.algorithms.advantages.remax import compute_remax_outcome_advantage


def test_remax_equals_the_loop(batch):
    returns, baselines = loops.rewards_to_go(batch), batch.reward_baselines.tolist()
    expected = {(i, t): value - baselines[i] for (i, t), value in returns.items()}
    shape = batch.response_mask.shape
    result = compute_remax_outcome_advantage(batch.token_level_rewards, batch.reward_baselines, batch.response_mask)
    loops.check_tokens(result, loops.filled(shape, expected), loops.filled(shape, returns))
