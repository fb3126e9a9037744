"""Whitening of few or equal values."""

import pytest
import torch

from verl.algorithms.advantages.common import whiten


def test_whitened_values_have_mean_0_and_std_1_over_the_mask():
    values = torch.tensor([[1.0, 2.0, 77.0], [6.0, torch.nan, -99.0]])
    result = whiten(values, torch.tensor([[1, 1, 0], [1, 0, 0]]))
    expected = torch.tensor([[-2.0, -1.0, 0.0], [3.0, 0.0, 0.0]], dtype=torch.float64) / (7 + 1e-8) ** 0.5
    torch.testing.assert_close(result, expected)


def test_whitening_without_a_token_is_0():
    assert whiten(torch.ones(2, 3), torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2


def test_whitening_keeps_the_value_of_a_single_token():
    assert whiten(torch.tensor([[5.0, 0.25]]), torch.tensor([[0, 1]])).tolist() == [[0.0, 0.25]]


@pytest.mark.parametrize("value", [0.1, 1e6 + 0.1, -1 / 3])
def test_whitening_makes_equal_values_0(value):
    assert whiten(torch.full((7, 3), value), torch.ones(7, 3)).abs().max() < 1e-9
