"""The GPG loss against a loop over tokens with the derivative by hand."""

import pytest

from fixtures.loss_cases import KL, check_token_loss
from verl.algorithms.losses.gpg import compute_policy_loss_gpg


def gpg(old, new, advantage):
    return -new * advantage, -advantage, {KL: old - new}


@pytest.mark.parametrize("weighted", [False, True])
def test_gpg_equals_the_loop(weighted):
    assert set(check_token_loss(compute_policy_loss_gpg, gpg, "token-mean", weighted)) == {KL}
