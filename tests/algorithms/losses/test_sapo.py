"""SAPO against a loop over tokens with the derivative by hand."""

import math

import pytest

from fixtures.loss_cases import CLIPFRAC, KL, LOWER, bounded_ratio, check_token_loss
from verl.algorithms.losses.sapo import compute_policy_loss_sapo


def sapo(old, new, advantage):
    ratio, slope, kl = bounded_ratio(old, new)
    tau = 1.3 if advantage > 0 else 2.1
    argument = tau * (ratio - 1)
    sigmoid = 1 / (1 + math.exp(-argument)) if argument < 700 else 1.0
    gate, by_ratio = 4 / tau * sigmoid, 4 * sigmoid * (1 - sigmoid)
    return -gate * advantage, -advantage * by_ratio * slope, {KL: kl}


@pytest.mark.parametrize("weighted", [False, True])
def test_sapo_equals_the_loop(weighted):
    metrics = check_token_loss(compute_policy_loss_sapo, sapo, "seq-mean-token-mean", weighted)
    assert set(metrics) == {CLIPFRAC, LOWER, KL}
