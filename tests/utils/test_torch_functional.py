"""Masked statistics, log-probabilities and padding against slow formulas in float64."""

import math
import statistics

import pytest
import torch

from verl.utils.torch_functional import (
    clip_by_value,
    entropy_from_logits,
    get_response_mask,
    logprobs_from_logits,
    masked_mean,
    masked_sum,
    masked_var,
    masked_whiten,
    pad_2d_list_to_length,
    pad_sequence_to_length,
)


@pytest.fixture
def table():
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    mask = (torch.rand(5, 7, generator=generator) > 0.4).long()
    mask[2] = 0
    return values.masked_fill(mask == 0, float("nan")), mask


def kept(values, mask):
    return [[v for v, m in zip(*rows, strict=True) if m] for rows in zip(values.tolist(), mask.tolist(), strict=True)]


def test_statistics_ignore_the_rest(table):
    values, mask = table
    rows = kept(values, mask)
    flat = [v for row in rows for v in row]
    assert masked_sum(values, mask).item() == pytest.approx(math.fsum(flat))
    assert masked_mean(values, mask).item() == pytest.approx(statistics.fmean(flat))
    assert masked_var(values, mask).item() == pytest.approx(statistics.variance(flat))
    assert masked_var(values, mask, unbiased=False).item() == pytest.approx(statistics.pvariance(flat))
    assert masked_mean(values, mask, axis=-1).tolist() == pytest.approx([sum(r) / len(r) if r else 0.0 for r in rows])
    assert masked_sum(values, mask, axis=(0, 1)).item() == pytest.approx(math.fsum(flat))


def test_whitened_values_have_mean_0_and_variance_1(table):
    values, mask = table
    whitened = [v for row in kept(masked_whiten(values, mask), mask) for v in row]
    assert statistics.fmean(whitened) == pytest.approx(0, abs=1e-12)
    assert statistics.variance(whitened) == pytest.approx(1, rel=1e-6)
    shifted = [v for row in kept(masked_whiten(values, mask, shift_mean=False), mask) for v in row]
    assert statistics.fmean(shifted) == pytest.approx(masked_mean(values, mask).item())
    with pytest.raises(ValueError, match=r"1 element\(s\) in the mask"):
        masked_whiten(values, one(mask))


def one(mask):
    single = torch.zeros_like(mask)
    single[0, 0] = 1
    return single


def test_log_probabilities_and_entropy_are_those_of_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, -1.0]], dtype=torch.float64)
    for row, label in zip(logits, (2, 0), strict=True):
        weights = [math.exp(x) for x in row.tolist()]
        p = [w / sum(weights) for w in weights]
        assert logprobs_from_logits(row, torch.tensor(label)).item() == pytest.approx(math.log(p[label]))
        assert entropy_from_logits(row).item() == pytest.approx(-sum(x * math.log(x) for x in p))


def test_the_response_mask_ends_with_the_first_stop_token():
    responses = torch.tensor([[5, 2, 2, 5], [5, 5, 5, 5], [9, 5, 2, 5]])
    assert get_response_mask(responses, 2).tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert get_response_mask(responses, [2, 9]).tolist()[2] == [1, 0, 0, 0]


def test_padding_and_clipping():
    row = torch.tensor([[1, 2]])
    assert pad_sequence_to_length(row, 4, 0).tolist() == [[1, 2, 0, 0]]
    assert pad_sequence_to_length(row, 4, 0, left_pad=True).tolist() == [[0, 0, 1, 2]]
    assert pad_sequence_to_length(row, 1, 0) is row
    assert pad_2d_list_to_length([[1], [2, 3]], 0, 3).tolist() == [[1, 0, 0], [2, 3, 0]]
    bounds = torch.tensor([0.0, 0.0]), torch.tensor([1.0, 3.0])
    assert clip_by_value(torch.tensor([2.0, 2.0]), *bounds).tolist() == [1.0, 2.0]
