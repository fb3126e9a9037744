"""The critic's loss against a loop over tokens in float64."""

import numpy as np
import pytest
import torch

from verl.trainer.ppo.core_algos import LOSS_AGG_MODES, compute_value_loss


def reference(vpreds, returns, values, mask, clip, mode, factor):
    """Loss and share of clipped tokens, from lists of lists."""
    sequences, clipped_tokens, tokens = [], 0, 0
    for v_row, r_row, old_row, m_row in zip(vpreds, returns, values, mask, strict=True):
        losses = []
        for v, r, old, m in zip(v_row, r_row, old_row, m_row, strict=True):
            if not m:
                continue
            near = min(max(v, old - clip), old + clip)
            losses.append(0.5 * max((v - r) ** 2, (near - r) ** 2))
            clipped_tokens += (near - r) ** 2 > (v - r) ** 2
            tokens += 1
        if losses:
            sequences.append(losses)
    total, count = sum(map(sum, sequences)), max(1, len(sequences))
    loss = {
        "token-mean": total / max(1, tokens),
        "token-sum": total,
        "seq-mean-token-sum": total / count,
        "seq-mean-token-sum-norm": total / count / factor,
        "seq-mean-token-mean": sum(sum(losses) / len(losses) for losses in sequences) / count,
    }[mode]
    return loss, clipped_tokens / max(1, tokens)


def make_case(scale=1.0, seed=0, rows=7, width=6):
    rng = np.random.default_rng(seed)
    vpreds, returns, values = (torch.tensor(rng.normal(0, scale, (rows, width))) for _ in range(3))
    lengths = torch.tensor([0, 1, width, *rng.integers(1, width, rows - 3)])
    mask = (torch.arange(width) < lengths[:, None]).long()
    mask[2, 2:4] = 0  # tokens of a tool in the middle
    return vpreds, returns, values, mask


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
@pytest.mark.parametrize("scale", [1e-3, 0.3, 1.0, 1e4])
@pytest.mark.parametrize("clip", [0.05, 0.5, 100.0])
def test_value_loss_equals_the_loop(mode, scale, clip):
    vpreds, returns, values, mask = make_case(scale)
    hidden = mask == 0
    loss, clipfrac = compute_value_loss(
        vpreds.masked_fill(hidden, 7.0),
        returns.masked_fill(hidden, torch.nan),
        values.masked_fill(hidden, torch.inf),
        mask,
        clip,
        mode,
        loss_scale_factor=11.0,
    )
    expected = reference(vpreds.tolist(), returns.tolist(), values.tolist(), mask.tolist(), clip, mode, factor=11.0)
    assert loss.item() == pytest.approx(expected[0], rel=1e-12)
    assert clipfrac.item() == pytest.approx(expected[1], rel=1e-12)
    if scale == 1.0 and clip == 0.5:
        assert 0 < expected[1] < 1


def test_parts_of_a_mini_batch_add_up_to_it():
    vpreds, returns, values, mask = make_case()
    tokens = mask.sum(1)
    whole = {
        "batch_num_tokens": int(tokens.sum()),
        "global_batch_size": int((tokens > 0).sum()),
        "loss_scale_factor": 5.0,
    }
    for mode in LOSS_AGG_MODES:
        expected = compute_value_loss(vpreds, returns, values, mask, 0.5, mode, loss_scale_factor=5.0)
        parts = [
            compute_value_loss(vpreds[rows], returns[rows], values[rows], mask[rows], 0.5, mode, **whole)
            for rows in (slice(0, 1), slice(1, 4), slice(4, 7))
        ]
        for i in range(2):
            assert sum(part[i].item() for part in parts) == pytest.approx(expected[i].item(), rel=1e-12)


@pytest.mark.parametrize(
    ("vpred", "gradient"),
    [
        (0.3, 0.3 - 1.0),  # within the range
        (0.7, 0.0),  # beyond the range, towards the return: the clipped error is larger and has no gradient
        (-0.7, -0.7 - 1.0),  # beyond the range, away from the return: the error counts
        (3.0, 3.0 - 1.0),  # beyond the return as well: the error counts
    ],
)
def test_gradient_is_0_only_where_the_clipped_error_is_larger(vpred, gradient):
    value = torch.tensor([[vpred]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.float64)
    loss, clipfrac = compute_value_loss(value, one, 0 * one, one, 0.5)
    loss.backward()
    assert value.grad.item() == pytest.approx(gradient)
    assert not clipfrac.requires_grad
    assert clipfrac.item() == (gradient == 0.0)


def test_value_loss_without_a_token_is_0():
    empty = torch.zeros(2, 3, requires_grad=True)
    loss, clipfrac = compute_value_loss(empty, torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2, 3), 0.5)
    loss.backward()
    assert loss.item() == clipfrac.item() == 0.0
    assert not empty.grad.any()
