"""Metrics against loops, and their values for an empty batch."""

import math

import pytest
import torch
from algorithms.rollout_correction import loops

from verl.algorithms.rollout_correction import apply_rollout_correction, correction_metrics
from verl.config.rollout_correction import RS_TERMS, Band, Correction, Rejection

TERMS = [(term, 0.8, 1.1) if term.endswith("k1") else (term, 0.0, 0.05) for term in RS_TERMS]
WEIGHTS = [
    (level, Band(lo, hi), zero, normalize)
    for level in ("token", "sequence")
    for lo, hi, zero, normalize in ((0.5, 2.0, False, False), (0.5, 5.0, True, False), (0.8, 1.2, True, True))
]


def correction_of(weights=(), terms=()):
    return Correction(*weights, rejections=tuple(Rejection(term, Band(lo, hi)) for term, lo, hi in terms))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_weight_metrics_equal_the_loop(weights):
    batch = loops.make_batch()
    level, band, zero, normalize = weights
    expected = loops.weight_metrics(loops.rows_of(*batch), level, band.lo, band.hi, zero, normalize)
    found = correction_metrics(*batch, correction_of(weights))
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("term", TERMS)
def test_rejection_metrics_of_a_term_equal_the_loop(term):
    batch = loops.make_batch()
    expected = loops.rejection_metrics(loops.rows_of(*batch), [term])
    assert correction_metrics(*batch, correction_of((), [term])) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_metrics_of_several_terms_and_weights_together():
    batch = loops.make_batch(4)
    rows, terms = loops.rows_of(*batch), [TERMS[0], TERMS[8], TERMS[9]]
    expected = {**loops.weight_metrics(rows, "token", 0.5, 2.0, False), **loops.rejection_metrics(rows, terms)}
    found = correction_metrics(*batch, correction_of(("token",), terms))
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    total = found["rollout_corr/rollout_rs_masked_fraction"]
    assert all(total >= found[f"rollout_corr/rollout_rs_{term}_masked_fraction"] for term, *_ in terms)


def test_metrics_without_weights_and_terms_are_empty():
    assert correction_metrics(*loops.make_batch(), Correction()) == {}


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (2, 0), (2, 3)])
def test_batch_without_a_token(shape):
    correction = correction_of(("sequence", Band(0.5, 2.0), True, True), TERMS)
    empty = torch.zeros(shape)
    weights, kept, metrics = apply_rollout_correction(empty, empty, empty.long(), correction)
    assert weights.shape == kept.shape == shape and not weights.any() and not kept.any()
    assert set(metrics.values()) == {0.0, 1.0}
    assert [name for name, value in metrics.items() if value] == ["rollout_corr/rollout_is_batch_norm_factor"]


def test_batch_of_one_token():
    d = torch.tensor([[math.log(1.5)]])
    correction = correction_of(("token",), [("seq_mean_k1", 0.5, 2.0)])
    weights, kept, metrics = apply_rollout_correction(d, torch.zeros(1, 1), torch.ones(1, 1), correction)
    assert weights.item() == pytest.approx(1.5) and kept.item() == 1
    assert metrics["rollout_corr/rollout_is_std"] == metrics["rollout_corr/rollout_is_seq_std"] == 0.0
    assert metrics["rollout_corr/rollout_is_eff_sample_size"] == pytest.approx(1.0)
    assert metrics["rollout_corr/rollout_rs_seq_mean_k1_mean"] == pytest.approx(math.log(1.5))


def test_batch_whose_tokens_are_all_rejected():
    d = torch.full((2, 3), 1.0)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    correction = correction_of((), [("seq_mean_k1", 0.999, 1.001)])
    _, kept, metrics = apply_rollout_correction(d, torch.zeros(2, 3), mask, correction)
    assert not kept.any()
    assert metrics["rollout_corr/rollout_rs_masked_fraction"] == 1.0
    assert metrics["rollout_corr/rollout_rs_seq_masked_fraction"] == 1.0
    assert metrics["rollout_corr/rollout_rs_seq_mean_k1_fraction_high"] == 1.0
    assert all(math.isfinite(value) for value in metrics.values())


def test_metrics_do_not_depend_on_the_mode():
    batch = loops.make_batch()
    decoupled = correction_of(("token",), TERMS[:2])
    bypass = Correction("token", rejections=decoupled.rejections, bypass_mode=True, loss_type="reinforce")
    assert correction_metrics(*batch, decoupled) == correction_metrics(*batch, bypass)


def test_float32_columns_are_summed_in_float64():
    d = torch.full((1, 3000), 1e-4)
    d[0, 0] = 3.0
    correction = correction_of((), [("seq_sum_k1", 0.5, 2.0)])
    metrics = correction_metrics(d, torch.zeros_like(d), torch.ones_like(d), correction)
    expected = 3.0 + 2999 * float(torch.tensor(1e-4))
    assert metrics["rollout_corr/rollout_rs_seq_sum_k1_seq_mean"] == pytest.approx(expected, rel=1e-12)
