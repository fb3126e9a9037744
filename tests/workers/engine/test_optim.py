"""Learning-rate schedules, gradient norm and clipping."""

import math

import pytest
import torch

from fixtures.engine_cases import optim_config
from verl.workers.engine.optim import clip_grads, global_grad_norm, lr_factor, warmup_steps


@pytest.mark.parametrize(
    ("steps", "ratio", "expected"), [(-1, 0.0, 0), (-1, 0.1, 10), (None, 0.25, 25), (0, 0.5, 0), (7, 0.5, 7)]
)
def test_warmup_steps(steps, ratio, expected):
    assert warmup_steps(optim_config(lr_warmup_steps=steps, lr_warmup_steps_ratio=ratio), 100) == expected


def test_constant_schedule_with_warmup():
    factors = [lr_factor(step, kind="constant", warmup=4, total=10) for step in range(7)]
    assert factors == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert lr_factor(0, kind="constant", warmup=0, total=10) == 1.0


def test_cosine_schedule_equals_that_of_transformers():
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=5, num_training_steps=20)
    for step in range(21):
        ours = lr_factor(step, kind="cosine", warmup=5, total=20)
        assert ours == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_cosine_schedule_ends_at_the_minimum_and_stays_there():
    for step in (20, 25):
        assert lr_factor(step, kind="cosine", warmup=5, total=20, min_lr_ratio=0.1) == pytest.approx(0.1)
    halfway = lr_factor(10, kind="cosine", warmup=0, total=20, min_lr_ratio=0.1)
    assert halfway == pytest.approx(0.1 + 0.9 * 0.5)


def test_an_unknown_schedule_is_an_error():
    with pytest.raises(ValueError, match=r"lr_scheduler_type='linear'.*constant, cosine"):
        lr_factor(0, kind="linear", warmup=0, total=1)


def test_norm_and_clipping_equal_those_of_torch():
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(3, 4, generator=generator), torch.randn(5, generator=generator)]
    expected = math.sqrt(math.fsum(float(x) ** 2 for grad in grads for x in grad.flatten()))
    norm = global_grad_norm(grads, None, torch.device("cpu"))
    assert norm == pytest.approx(expected, rel=1e-6)
    parameters = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    clip_grads(grads, norm, 1.0)
    for parameter, grad in zip(parameters, grads, strict=True):
        torch.testing.assert_close(grad, parameter.grad)
    kept = [grad.clone() for grad in grads]
    clip_grads(grads, global_grad_norm(grads, None, torch.device("cpu")), 10.0)
    assert all(torch.equal(a, b) for a, b in zip(kept, grads, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_norm_of_a_non_finite_gradient_is_not_finite(bad):
    norm = global_grad_norm([torch.tensor([1.0, bad])], None, torch.device("cpu"))
    assert not math.isfinite(norm)


def test_the_norm_without_gradients_is_zero():
    assert global_grad_norm([], None, torch.device("cpu")) == 0.0
