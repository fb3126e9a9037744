"""Properties of all built-in policy losses."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from fixtures.loss_cases import CONFIG, global_batch_info, make_loss_batch, shares, tokens
from verl.algorithms.losses import (
    LOSS_AGG_MODES,
    get_policy_loss_fn,
    get_token_selector,
    register_policy_loss,
)
from verl.config import names

LOSSES = [name for name in names.POLICY_LOSSES if name != "bypass_mode"]
SELECTING = {"clip_cov", "kl_cov"}
FIXED_AGGREGATION = {name for name in LOSSES if names.POLICY_LOSSES[name].own_aggregation}
READING_THE_CONFIG = [name for name in LOSSES if names.POLICY_LOSSES[name].reads]


def evaluate(name, batch, config=CONFIG, mode="token-mean", weights=None, selected=None):
    """Loss, metrics, and the gradient by the new log-probabilities."""
    new = batch.new.clone().requires_grad_()
    selector = get_token_selector(name)
    if selector is not None and selected is None:
        selected = selector(new, batch.old, batch.advantages, batch.mask, config, 1)
    loss, metrics = get_policy_loss_fn(name)(
        old_log_prob=batch.old,
        log_prob=new,
        advantages=batch.advantages,
        response_mask=batch.mask,
        loss_agg_mode=mode,
        config=config,
        rollout_is_weights=weights,
        **({} if selector is None else {"selected_tokens": selected}),
    )
    loss.backward()
    assert all(isinstance(value, torch.Tensor) and not value.requires_grad for value in metrics.values())
    return loss.detach(), metrics, new.grad


def rows(batch, index):
    return SimpleNamespace(**{name: column[index] for name, column in vars(batch).items()})


@pytest.mark.parametrize("cuts", [[0, 16], [0, 3, 4, 11, 16], list(range(17))])
@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_parts_of_a_shuffled_mini_batch_add_up_to_it(name, mode, cuts):
    batch = make_loss_batch()
    config = SimpleNamespace(**vars(CONFIG), global_batch_info=global_batch_info(batch.mask))
    alone = SimpleNamespace(**vars(CONFIG), global_batch_info={"loss_scale_factor": 512})
    selector = get_token_selector(name)
    selected = selector and selector(batch.new, batch.old, batch.advantages, batch.mask, config, 1)
    whole, metrics, gradient = evaluate(name, batch, alone, mode, batch.weights, selected)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(4))
    total, sums, pieces = 0.0, dict.fromkeys(metrics, 0.0), torch.zeros_like(gradient)
    for start, stop in itertools.pairwise(cuts):
        index = order[start:stop]
        part = rows(batch, index)
        own = None if selected is None else selected[index]
        loss, some, pieces[index] = evaluate(name, part, config, mode, part.weights, own)
        total += loss
        sums = {key: sums[key] + value for key, value in some.items()}
    torch.testing.assert_close(total, whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(pieces, gradient, rtol=1e-10, atol=1e-14)
    for key, value in metrics.items():
        torch.testing.assert_close(sums[key], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_depends_on_loss_agg_mode_except_for_fixed_aggregations(name):
    losses = {evaluate(name, make_loss_batch(), mode=mode)[0].item() for mode in LOSS_AGG_MODES}
    assert len(losses) == (1 if name in FIXED_AGGREGATION else len(LOSS_AGG_MODES))


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_on_policy_is_the_policy_gradient(name):
    batch = make_loss_batch()
    batch.old = batch.new.clone()
    batch.advantages = batch.advantages[:, :1].expand_as(batch.new)  # geo_mean uses one advantage per sequence
    nothing = torch.zeros_like(batch.mask)
    _, _, gradient = evaluate(name, batch, mode="seq-mean-token-mean", selected=nothing)
    expected = torch.zeros_like(gradient)
    for place, share in shares(batch.mask, "seq-mean-token-mean").items():
        expected[place] = -batch.advantages[place] * share
    if name == "geo_mean":
        torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-12)
    else:
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_importance_weights_scale_the_loss_and_get_no_gradient(name):
    batch = make_loss_batch()
    weights = torch.full_like(batch.old, 0.25, requires_grad=True)
    unweighted, before, by_new = evaluate(name, batch)
    weighted, after, by_new_weighted = evaluate(name, batch, weights=weights)
    # geo_mean adds 1e-10 to a weight
    torch.testing.assert_close(weighted, 0.25 * unweighted, rtol=1e-8, atol=0)
    torch.testing.assert_close(by_new_weighted, 0.25 * by_new, rtol=1e-8, atol=0)
    assert weights.grad is None and after == before


@pytest.mark.parametrize("name", LOSSES)
def test_loss_without_advantages_is_its_penalty(name):
    batch = make_loss_batch()
    batch.advantages[:] = 0.0
    loss, _, gradient = evaluate(name, batch)
    if name in ("dro", "kl_cov"):
        assert loss > 0
    else:
        assert loss == 0 and gradient.abs().max() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_loss_without_a_token_is_0(name):
    batch = make_loss_batch()
    batch.mask[:] = 0
    loss, metrics, gradient = evaluate(name, batch)
    assert loss == 0 and gradient.abs().max() == 0
    assert all(value == 0 for value in metrics.values())


@pytest.mark.parametrize("name", LOSSES)
def test_float32_stays_finite_and_close_to_float64(name):
    batch = make_loss_batch()
    exact, _, exact_gradient = evaluate(name, batch)
    selector = get_token_selector(name)
    selected = selector and selector(batch.new, batch.old, batch.advantages, batch.mask, CONFIG, 1)
    batch.old[3], batch.new[3] = -500.0, -0.5  # padding whose ratio overflows float32
    single = SimpleNamespace(**{k: v.float() if v.is_floating_point() else v for k, v in vars(batch).items()})
    loss, metrics, gradient = evaluate(name, single, selected=selected)
    assert loss.dtype == torch.float32 and all(torch.isfinite(value) for value in metrics.values())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", READING_THE_CONFIG)
def test_missing_config_is_an_error(name):
    batch = make_loss_batch()
    nothing = {"selected_tokens": torch.zeros_like(batch.mask)} if name in SELECTING else {}
    with pytest.raises(ValueError, match="config=None"):
        get_policy_loss_fn(name)(batch.old, batch.new, batch.advantages, batch.mask, **nothing)


def test_selectors_are_found_by_name_and_by_function():
    assert {name for name in LOSSES if get_token_selector(name) is not None} == SELECTING

    def select(**columns):
        raise NotImplementedError

    @register_policy_loss("test_every_loss_selects", select_tokens=select)
    def loss(**columns):
        raise NotImplementedError

    assert get_token_selector("test_every_loss_selects") is select
    assert get_token_selector(loss) is select
    assert get_token_selector(lambda **columns: None) is None
    with pytest.raises(ValueError, match=r"loss_mode='gsop' is not registered: use one of .*gspo"):
        get_token_selector("gsop")


def test_batch_has_the_documented_edge_cases():
    batch = make_loss_batch()
    lengths = batch.mask.sum(1).tolist()
    distances = [(batch.new - batch.old)[place].item() for place in tokens(batch.mask)]
    assert 0 in lengths and 1 in lengths and len(set(lengths)) > 3
    assert max(distances) == 25 and min(distances) == -25
    assert (batch.new <= 0).all() and (batch.old <= 0).all()
