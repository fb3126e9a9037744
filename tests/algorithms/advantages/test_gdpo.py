"""GDPO against a loop over Python floats, and its errors."""

from types import SimpleNamespace

import pytest
from algorithms.advantages import loops

from verl.algorithms.advantages.gdpo import compute_gdpo_outcome_advantage


@pytest.mark.parametrize("by_std", [True, False])
@pytest.mark.parametrize("weights", [None, [1.0, 0.5]])
def test_gdpo_equals_the_loop(batch, config, by_std, weights):
    parts = []
    for key in ("accuracy", "format"):
        numbers = [0.0 if value is None else float(value) for value in batch.non_tensors[key]]
        parts.append(loops.normalized_scores(numbers, batch.index, by_std))
    first, second = weights or (1.0, 1.0)
    rows = [[first * a + second * b] * 8 for a, b in zip(*parts, strict=True)]
    config.norm_adv_by_std_in_grpo, config.gdpo_reward_weights = by_std, weights
    result = compute_gdpo_outcome_advantage(
        batch.token_level_rewards,
        batch.response_mask,
        batch.index,
        config=config,
        non_tensor_batch=batch.non_tensors,
    )
    loops.check_outcome(result, loops.whitened_rows(rows, batch.response_mask))


def test_gdpo_without_a_config_uses_the_score_as_its_only_reward(batch):
    scores = loops.normalized_scores(loops.total_rewards(batch.token_level_rewards), batch.index)
    result = compute_gdpo_outcome_advantage(batch.token_level_rewards, batch.response_mask, batch.index)
    loops.check_outcome(result, loops.whitened_rows([[score] * 8 for score in scores], batch.response_mask))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gdpo_reward_keys": None}, r"gdpo_reward_keys=None: .*set it"),
        ({"gdpo_reward_keys": ["accuracy", "style"]}, "did not return 'style'; it returned accuracy, format"),
        ({"gdpo_reward_weights": [1.0]}, r"1 weights for 2 .*\['accuracy', 'format'\]"),
    ],
)
def test_gdpo_rejects_wrong_reward_keys_and_weights(batch, config, changes, words):
    config = SimpleNamespace(**{**vars(config), **changes})
    with pytest.raises(ValueError, match=words):
        compute_gdpo_outcome_advantage(
            batch.token_level_rewards,
            batch.response_mask,
            batch.index,
            config=config,
            non_tensor_batch=batch.non_tensors,
        )


@pytest.mark.parametrize("value", ["good", float("nan"), [1.0, 2.0]])
def test_gdpo_names_the_sample_without_a_finite_number(batch, config, value):
    batch.non_tensors["accuracy"][6] = value
    with pytest.raises(ValueError, match=r"'accuracy' of sample 6 is .*finite number"):
        compute_gdpo_outcome_advantage(
            batch.token_level_rewards,
            batch.response_mask,
            batch.index,
            config=config,
            non_tensor_batch=batch.non_tensors,
        )
