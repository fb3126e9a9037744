"""Estimators on a sample's total reward, against loops over Python floats."""

import math
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from verl.algorithms import advantages as adv


def totals_of(rewards):
    return [math.fsum(row) for row in rewards.tolist()]


def others_of(index, i):
    return [j for j in range(len(index)) if index[j] == index[i] and j != i]


def group_of(index, i):
    return [j for j in range(len(index)) if index[j] == index[i]]


def normal_scores(totals, index, by_std=True):
    scores = []
    for i, total in enumerate(totals):
        group = [totals[j] for j in group_of(index, i)]
        if len(group) == 1:
            scores.append(total / (1 + 1e-6) if by_std else total)
        else:
            centred = total - statistics.fmean(group)
            scores.append(centred / (statistics.stdev(group) + 1e-6) if by_std else centred)
    return scores


def spread(scores, mask):
    rows = [[s if m else 0.0 for m in row] for s, row in zip(scores, mask.tolist(), strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


def whitened(rows, mask):
    chosen = [v for row, ms in zip(rows, mask.tolist(), strict=True) for v, m in zip(row, ms, strict=True) if m]
    mean, variance = statistics.fmean(chosen), statistics.variance(chosen)
    return torch.tensor(
        [
            [(v - mean) / math.sqrt(variance + 1e-8) if m else 0.0 for v, m in zip(row, ms, strict=True)]
            for row, ms in zip(rows, mask.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )


def check(result, expected):
    advantages, returns = result
    assert advantages.dtype == returns.dtype == torch.float32
    torch.testing.assert_close(advantages.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(advantages, returns)
    assert advantages.data_ptr() != returns.data_ptr()


def rloo(batch, alone):
    totals, scores = totals_of(batch.token_level_rewards), []
    for i, total in enumerate(totals):
        others = [totals[j] for j in others_of(batch.index, i)]
        scores.append(total - statistics.fmean(others) if others else alone(total))
    return spread(scores, batch.response_mask)


def test_rloo(batch):
    result = adv.compute_rloo_outcome_advantage(batch.token_level_rewards, batch.response_mask, batch.index)
    check(result, rloo(batch, alone=lambda total: total))


def test_rloo_vectorized_leaves_a_group_of_one_out(batch):
    result = adv.compute_rloo_vectorized_outcome_advantage(batch.token_level_rewards, batch.response_mask, batch.index)
    check(result, rloo(batch, alone=lambda total: 0.0))


def test_opo(batch):
    totals, lengths = totals_of(batch.token_level_rewards), [sum(row) for row in batch.response_mask.tolist()]
    scores = []
    for i, total in enumerate(totals):
        group = group_of(batch.index, i)
        whole = sum(lengths[j] for j in group)
        weighted = math.fsum(lengths[j] * totals[j] for j in group) / whole if whole else 0.0
        scores.append(total if len(group) == 1 else total - weighted)
    result = adv.compute_opo_outcome_advantage(batch.token_level_rewards, batch.response_mask, batch.index)
    check(result, spread(scores, batch.response_mask))


@pytest.mark.parametrize("f_norm", [1.0, 2.5])
def test_gpg(batch, f_norm):
    batch.token_level_rewards[[0, 1, 5]] = 0.0
    totals = totals_of(batch.token_level_rewards)
    alpha = len(totals) / sum(total != 0 for total in totals)
    scores = [alpha * score / f_norm for score in normal_scores(totals, batch.index, by_std=False)]
    result = adv.compute_gpg_outcome_advantage(
        batch.token_level_rewards, batch.response_mask, batch.index, f_norm=f_norm
    )
    check(result, spread(scores, batch.response_mask))


def test_gpg_of_nothing_but_zeros():
    advantages, _ = adv.compute_gpg_outcome_advantage(torch.zeros(3, 2), torch.ones(3, 2), np.array(["a"] * 3))
    assert advantages.tolist() == [[0.0] * 2] * 3


@pytest.mark.parametrize("by_std", [True, False])
def test_grpo_passk(batch, config, by_std):
    batch.token_level_rewards[1] += 9  # b's best, twice
    batch.token_level_rewards[8] = batch.token_level_rewards[1]
    totals, scores = totals_of(batch.token_level_rewards), []
    for i, total in enumerate(totals):
        others = [totals[j] for j in others_of(batch.index, i)]
        lead = total - max(others) if others and total > max(others) else 0.0
        deviation = statistics.stdev([total, *others]) + 1e-6 if by_std and others else 1.0
        scores.append(lead / deviation)
    assert scores[1] == scores[8] == 0.0
    assert sum(score > 0.1 and row.any() for score, row in zip(scores, batch.response_mask, strict=True)) == 2
    config.norm_adv_by_std_in_grpo = by_std
    result = adv.compute_grpo_passk_outcome_advantage(
        batch.token_level_rewards, batch.response_mask, batch.index, config=config
    )
    check(result, spread(scores, batch.response_mask))


def test_reinforce_plus_plus_baseline(batch):
    scores = normal_scores(totals_of(batch.token_level_rewards), batch.index, by_std=False)
    expected = whitened([[score] * 8 for score in scores], batch.response_mask)
    result = adv.compute_reinforce_plus_plus_baseline_outcome_advantage(
        batch.token_level_rewards, batch.response_mask, batch.index
    )
    check(result, expected)


@pytest.mark.parametrize("by_std", [True, False])
@pytest.mark.parametrize("weights", [None, [1.0, 0.5]])
def test_gdpo(batch, config, by_std, weights):
    parts = []
    for key in ("accuracy", "format"):
        numbers = [0.0 if value is None else float(value) for value in batch.non_tensors[key]]
        parts.append(normal_scores(numbers, batch.index, by_std))
    first, second = weights or (1.0, 1.0)
    rows = [[first * a + second * b] * 8 for a, b in zip(*parts, strict=True)]
    config.norm_adv_by_std_in_grpo, config.gdpo_reward_weights = by_std, weights
    result = adv.compute_gdpo_outcome_advantage(
        batch.token_level_rewards,
        batch.response_mask,
        batch.index,
        config=config,
        non_tensor_batch=batch.non_tensors,
    )
    check(result, whitened(rows, batch.response_mask))


def test_gdpo_without_a_config_has_the_score_as_its_one_reward(batch):
    scores = normal_scores(totals_of(batch.token_level_rewards), batch.index)
    result = adv.compute_gdpo_outcome_advantage(batch.token_level_rewards, batch.response_mask, batch.index)
    check(result, whitened([[score] * 8 for score in scores], batch.response_mask))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gdpo_reward_keys": None}, r"gdpo_reward_keys=None: .*set it"),
        ({"gdpo_reward_keys": ["accuracy", "style"]}, "no 'style', but accuracy, format"),
        ({"gdpo_reward_weights": [1.0]}, r"1 weights for 2 .*\['accuracy', 'format'\]"),
    ],
)
def test_gdpo_says_what_is_wrong_with_its_rewards(batch, config, changes, words):
    config = SimpleNamespace(**{**vars(config), **changes})
    with pytest.raises(ValueError, match=words):
        adv.compute_gdpo_outcome_advantage(
            batch.token_level_rewards,
            batch.response_mask,
            batch.index,
            config=config,
            non_tensor_batch=batch.non_tensors,
        )


@pytest.mark.parametrize("value", ["good", float("nan"), [1.0, 2.0]])
def test_gdpo_names_the_sample_without_a_number(batch, config, value):
    batch.non_tensors["accuracy"][6] = value
    with pytest.raises(ValueError, match=r"'accuracy' of sample 6 is .*finite number"):
        adv.compute_gdpo_outcome_advantage(
            batch.token_level_rewards,
            batch.response_mask,
            batch.index,
            config=config,
            non_tensor_batch=batch.non_tensors,
        )
