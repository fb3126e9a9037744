"""Loss aggregation against a float64 loop, for a whole mini-batch and for its parts."""

import math

import pytest
import torch

from verl.algorithms.aggregation import LOSS_AGG_MODES, agg_loss


def reference(loss, mask, mode, scale):
    sequences = [[x for x, m in zip(row, keep, strict=True) if m] for row, keep in zip(loss, mask, strict=True)]
    sequences = [s for s in sequences if s]
    total = math.fsum(x for s in sequences for x in s)
    if mode == "token-mean":
        return total / sum(len(s) for s in sequences)
    if mode == "token-sum":
        return total
    per_sequence = [math.fsum(s) for s in sequences]
    if mode == "seq-mean-token-mean":
        per_sequence = [v / len(s) for v, s in zip(per_sequence, sequences, strict=True)]
    if mode == "seq-mean-token-sum-norm":
        per_sequence = [v / scale for v in per_sequence]
    return math.fsum(per_sequence) / len(sequences)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    loss = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    mask = (torch.rand(9, 5, generator=generator) > 0.4).long()
    mask[2] = 0
    mask[6] = 0
    mask[0] = 1
    return loss, mask


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_agg_loss_equals_the_loop(batch, mode):
    loss, mask = batch
    assert agg_loss(loss, mask, mode).item() == pytest.approx(
        reference(loss.tolist(), mask.tolist(), mode, 5), rel=1e-12
    )
    scaled = agg_loss(loss, mask, mode, loss_scale_factor=512)
    assert scaled.item() == pytest.approx(reference(loss.tolist(), mask.tolist(), mode, 512), rel=1e-12)


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
@pytest.mark.parametrize("part", [1, 2, 4, 9])
def test_parts_add_up_to_the_whole(batch, mode, part):
    loss, mask = batch
    denominators = {
        "batch_num_tokens": int(mask.sum()),
        "global_batch_size": int((mask.sum(1) > 0).sum()),
        "loss_scale_factor": 5,
    }
    parts = [agg_loss(a, m, mode, **denominators) for a, m in zip(loss.split(part), mask.split(part), strict=True)]
    assert sum(parts).item() == pytest.approx(agg_loss(loss, mask, mode).item(), rel=1e-12)


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_arguments_have_the_order_and_the_names_of_upstream(batch, mode):
    loss, mask = batch
    expected = 2 * agg_loss(loss, mask, mode, batch_num_tokens=7, global_batch_size=3, loss_scale_factor=5)
    assert agg_loss(loss, mask, mode, 2, 7, 3, 5).item() == pytest.approx(expected.item(), rel=1e-12)
    named = agg_loss(
        loss_mat=loss,
        loss_mask=mask,
        loss_agg_mode=mode,
        dp_size=2,
        batch_num_tokens=7,
        global_batch_size=3,
        loss_scale_factor=5,
    )
    assert named.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_padding_is_ignored(batch, mode):
    loss, mask = batch
    expected = agg_loss(loss, mask, mode)
    dirty = loss.masked_fill(mask == 0, float("nan")).requires_grad_()
    value = agg_loss(dirty, mask, mode)
    value.backward()
    assert value.item() == expected.item()
    assert torch.isfinite(dirty.grad).all()


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_loss_without_a_token_is_0(mode):
    loss = torch.randn(3, 4, requires_grad=True)
    for denominators in ({}, {"batch_num_tokens": 0, "global_batch_size": 0, "loss_scale_factor": 4}):
        value = agg_loss(loss, torch.zeros(3, 4), mode, **denominators)
        assert value.item() == 0
        value.backward()
    assert loss.grad.abs().max() == 0


def test_unknown_mode_is_an_error():
    with pytest.raises(ValueError, match=r"unknown loss_agg_mode='mean'.*token-mean"):
        agg_loss(torch.zeros(1, 1), torch.ones(1, 1), "mean")
