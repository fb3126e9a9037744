"""DRO against a loop over tokens with the derivative by hand, and its missing coefficient."""

from types import SimpleNamespace

import pytest

from fixtures.loss_cases import KL, check_token_loss, make_loss_batch
from verl.algorithms.losses.dro import compute_policy_loss_dro


def dro(old, new, advantage):
    distance = new - old
    return -(advantage * new - 0.05 / 2 * distance**2), -advantage + 0.05 * distance, {KL: -distance}


@pytest.mark.parametrize("weighted", [False, True])
def test_dro_equals_the_loop(weighted):
    assert set(check_token_loss(compute_policy_loss_dro, dro, "token-mean", weighted)) == {KL}


@pytest.mark.parametrize("beta", [None, 0.0, -1.0])
def test_dro_requires_a_positive_coefficient(beta):
    batch = make_loss_batch()
    config = SimpleNamespace(policy_loss=SimpleNamespace(dro_beta=beta))
    with pytest.raises(ValueError, match=rf"policy_loss\.dro_beta={beta}: .* above 0"):
        compute_policy_loss_dro(batch.old, batch.new, batch.advantages, batch.mask, "token-mean", config)
