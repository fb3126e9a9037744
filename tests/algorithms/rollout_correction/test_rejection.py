"""Rejection against loops."""

import itertools
import math

import pytest
import torch
from algorithms.rollout_correction import loops

from verl.algorithms.rollout_correction import rejection_mask
from verl.config.rollout_correction import RS_TERMS, Band, Rejection

# For each term, bounds that separate values of the batch.
BANDS = {
    "token_k1": [(0.9, 1.5), (0.7, 1.01)],
    "token_k2": [(0, 0.02), (0, 0.3)],
    "token_k3": [(0, 0.02), (0, 0.3)],
    "seq_sum_k1": [(0.45, 2.5), (0.9, 3.0)],
    "seq_sum_k2": [(0, 0.1), (0, 1.0)],
    "seq_sum_k3": [(0, 0.1), (0, 1.0)],
    "seq_mean_k1": [(0.95, 1.2), (0.85, 1.01)],
    "seq_mean_k2": [(0, 0.01), (0, 0.1)],
    "seq_mean_k3": [(0, 0.01), (0, 0.1)],
    "seq_max_k2": [(0, 0.01), (0, 0.2)],
    "seq_max_k3": [(0, 0.01), (0, 0.2)],
    "binary_kl": [(0, 0.01), (0, 0.05)],
}
CASES = [(term, lo, hi) for term, bands in BANDS.items() for lo, hi in bands]


def mask_of(terms, batch):
    return rejection_mask(*batch, [Rejection(term, Band(lo, hi)) for term, lo, hi in terms])


def test_every_term_has_a_case():
    assert set(BANDS) == set(RS_TERMS)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_rejection_by_one_term_equals_the_loop(case, seed):
    batch = loops.make_batch(seed)
    expected = loops.spread(loops.kept(loops.rows_of(*batch), [case]), batch[2]).long()
    assert torch.equal(mask_of([case], batch), expected)
    assert 0 < expected.sum() < batch[2].sum()


@pytest.mark.parametrize("pair", itertools.combinations(CASES[1::2], 2))
def test_token_is_kept_only_if_two_terms_keep_it(pair):
    batch = loops.make_batch()
    expected = loops.spread(loops.kept(loops.rows_of(*batch), list(pair)), batch[2]).long()
    assert torch.equal(mask_of(pair, batch), expected)
    one, other = (mask_of([case], batch) for case in pair)
    assert torch.equal(expected, one * other)


@pytest.mark.parametrize("term", ["token_k1", "seq_sum_k1", "seq_mean_k1"])
def test_k1_bounds_are_bounds_of_the_ratio_of_trainer_to_rollout(term):
    # The ratio of trainer to rollout is 1.5: inside 0.9_2, outside its mirror image 0.5_1.11.
    log_pi, log_mu = torch.tensor([[0.6]]).log(), torch.tensor([[0.4]]).log()
    batch = (log_pi, log_mu, torch.ones(1, 1))
    assert mask_of([(term, 0.9, 2.0)], batch).item() == 1
    assert mask_of([(term, 0.5, 1 / 0.9)], batch).item() == 0
    mirrored = (log_mu, log_pi, torch.ones(1, 1))
    assert mask_of([(term, 0.9, 2.0)], mirrored).item() == 0
    assert mask_of([(term, 0.5, 1 / 0.9)], mirrored).item() == 1


def test_sum_grows_with_the_length_and_mean_does_not():
    d = torch.tensor([[0.1] * 8, [0.1] * 2 + [9.0] * 6], dtype=torch.float64)
    mask = torch.tensor([[1] * 8, [1] * 2 + [0] * 6])
    batch = (d, torch.zeros_like(d), mask)
    assert mask_of([("seq_sum_k1", 0.5, 2.0)], batch).sum(-1).tolist() == [0, 2]
    assert mask_of([("seq_mean_k1", 0.5, 2.0)], batch).sum(-1).tolist() == [8, 2]


@pytest.mark.parametrize("term", RS_TERMS)
def test_equal_policies_are_kept_and_distant_ones_rejected(term):
    log_mu = -torch.rand(3, 4, generator=torch.Generator().manual_seed(3)) - 0.1
    mask = torch.ones(3, 4, dtype=torch.bool)
    bounds = (0.999, 1.001) if term.endswith("k1") else (0.0, 1e-6)
    kept = mask_of([(term, *bounds)], (log_mu.clone(), log_mu, mask))
    assert kept.dtype == torch.bool and bool(kept.all())
    for gap in (-100.0, 100.0):
        assert not mask_of([(term, *bounds)], (log_mu + gap, log_mu, mask)).any()


def test_nan_is_rejected():
    log_pi = torch.tensor([[float("nan"), float("-inf"), -1.0]])
    kept = mask_of([("token_k1", 0.5, 2.0)], (log_pi, torch.full((1, 3), -1.0), torch.ones(1, 3)))
    assert kept.tolist() == [[0, 0, 1]]


def test_value_at_the_upper_bound_is_kept():
    d = torch.tensor([[math.log(2), math.log(2.01)]], dtype=torch.float64)
    assert mask_of([("token_k1", 0.5, 2.0)], (d, torch.zeros_like(d), torch.ones(1, 2))).tolist() == [[1, 0]]


def test_rejection_without_terms_returns_the_mask_in_its_dtype():
    log_pi, log_mu, mask = loops.make_batch()
    for dtype in (torch.int64, torch.float32, torch.bool):
        kept = rejection_mask(log_pi, log_mu, mask.to(dtype), [])
        assert kept.dtype == dtype and torch.equal(kept, mask.to(dtype))
