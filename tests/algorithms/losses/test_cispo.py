"""CISPO against a loop over tokens with the derivative by hand."""

import pytest

from fixtures.loss_cases import CLIPFRAC, CONFIG, KL, LOWER, bounded_ratio, check_token_loss, make_loss_batch
from verl.algorithms.losses.cispo import compute_policy_loss_cispo


def cispo(old, new, advantage):
    ratio, _, kl = bounded_ratio(old, new)
    weight = 1.28 if ratio > 1.28 else 0.8 if ratio < 0.8 else ratio
    return -weight * advantage * new, -weight * advantage, {KL: kl, CLIPFRAC: weight != ratio}


@pytest.mark.parametrize("weighted", [False, True])
def test_cispo_equals_the_loop(weighted):
    metrics = check_token_loss(compute_policy_loss_cispo, cispo, "token-mean", weighted)
    assert set(metrics) == {CLIPFRAC, LOWER, KL}


def test_batch_has_tokens_inside_and_outside_the_bounds_of_cispo():
    batch = make_loss_batch()
    _, metrics = compute_policy_loss_cispo(batch.old, batch.new, batch.advantages, batch.mask, "token-mean", CONFIG)
    assert 0.1 < metrics[CLIPFRAC].item() < 0.9
