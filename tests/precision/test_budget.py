"""The search, with costs that do not add up."""

import random

import pytest

from verl.precision.budget import search
from verl.precision.plans import Option


def make_options(seed=0, units=40):
    draw = random.Random(seed)
    return [Option(f"layer {unit}", "fine", (3, 5, 8, 16)[unit % 4], draw.random() ** 4 / 100) for unit in range(units)]


class Model:
    """Divergence of a model whose layers interact: `strength` 0 adds the costs, others bend the sum."""

    def __init__(self, options, strength):
        self.costs = {option.unit: option.cost for option in options}
        self.strength, self.calls = strength, 0

    def kl(self, schemes):
        self.calls += 1
        total = sum(self.costs[unit] for unit in schemes)
        return total if len(schemes) < 2 else total * (1 + self.strength * len(schemes) / len(self.costs))


@pytest.mark.parametrize("strength", [0, 0.8, -0.4])
@pytest.mark.parametrize("budget", [0.001, 0.01, 0.05])
def test_chosen_plan_is_the_best_within_the_budget(strength, budget):
    options = make_options()
    model = Model(options, strength)
    found = search(options, model.kl, budget)
    chosen = found.chosen
    assert chosen.measured == model.kl(chosen.plan.schemes) <= budget
    better = [plan for plan in found.plans if plan.saved > chosen.plan.saved and model.kl(plan.schemes) <= budget]
    assert not better or chosen.measured > 0.98 * budget
    assert abs(chosen.predicted / chosen.measured - 1) < 0.25


def test_number_of_measurements_is_limited():
    """Six for the curve and eight for the search, even if predictions are wrong."""
    options, calls = make_options(units=80), []
    total = sum(option.cost for option in options)

    def step(schemes):
        calls.append(schemes)
        cost = sum(option.cost for option in options if option.unit in schemes)
        return 0.005 if cost < 0.95 * total else 0.03

    search(options, step, 0.01)
    assert len(calls) <= 14


def test_everything_is_quantized_if_the_budget_allows_it():
    options = make_options()
    found = search(options, Model(options, 0.8).kl, 10.0)
    assert len(found.chosen.plan.options) == len(options) and found.chosen is found.measured[-1]


def test_budget_that_cannot_be_met_names_the_smallest_one():
    options = [Option("q", "fine", 4, 0.00123), Option("o", "fine", 4, 0.02)]
    kl = Model(options, 0).kl
    with pytest.raises(ValueError, match=r"kl=0.0012: cannot be met: .* q, alone cost 0.00123 .* is kl=0.0013; or set"):
        search(options, kl, 0.0012)
    assert search(options, kl, 0.0013).chosen.plan.schemes == {"q": "fine"}


def test_layers_that_never_cost_anything_are_within_any_budget():
    options = [Option("unused", "fine", 4, 0.0), Option("o", "fine", 4, 0.02)]
    assert search(options, Model(options, 0).kl, 1e-9).chosen.plan.schemes == {"unused": "fine"}
