"""Best plans, compared with all combinations."""

import itertools
import random

import pytest

from verl.precision.plans import Option, Plan, Prediction, best_plans


def random_options(seed):
    draw = random.Random(seed)
    return [
        Option(f"layer {unit}", scheme, draw.choice((3, 5, 8)) * factor, draw.random() ** 3 * factor)
        for unit in range(6)
        for scheme, factor in (("coarse", 2), ("fine", 1))
    ]


def all_combinations(options):
    by_unit = [[None, *(o for o in options if o.unit == unit)] for unit in dict.fromkeys(o.unit for o in options)]
    for combination in itertools.product(*by_unit):
        chosen = [option for option in combination if option is not None]
        yield sum(option.saved for option in chosen), sum(option.cost for option in chosen)


@pytest.mark.parametrize("seed", range(5))
def test_no_combination_saves_more_within_a_budget(seed):
    options = random_options(seed)
    plans = best_plans(options)
    combinations = list(all_combinations(options))
    for budget in (0.0, 0.01, 0.1, 0.5, 1.0, 2.0, 100.0):
        best = max(plan.saved for plan in plans if plan.cost <= budget + 1e-12)
        assert best == max(saved for saved, cost in combinations if cost <= budget + 1e-12)


def test_plans_ascend_and_consist_of_their_options():
    options = random_options(7)
    plans = best_plans(options)
    assert plans[0].options == [] and plans[0].schemes == {}
    for before, after in itertools.pairwise(plans):
        assert before.saved < after.saved and before.cost < after.cost
    for plan in plans:
        assert sum(option.saved for option in plan.options) == plan.saved
        assert sum(option.cost for option in plan.options) == pytest.approx(plan.cost)
        assert len(plan.schemes) == len(plan.options), "a unit is in a plan once"


def test_layers_without_cost_are_quantized_first():
    plans = best_plans([Option("a", "fine", 4, 0.0), Option("b", "fine", 4, 0.1)])
    assert [plan.schemes for plan in plans] == [{}, {"a": "fine"}, {"a": "fine", "b": "fine"}]


def test_prediction_adds_costs_and_learns_their_interaction():
    predict = Prediction(0.01)
    assert predict(Plan(1, 0.04)) == pytest.approx(0.04) and predict(Plan()) == 0
    predict.learn(Plan(1, 0.16), 0.32)
    assert predict(Plan(1, 0.16)) == pytest.approx(0.32)
    assert predict(Plan(1, 0.01)) == pytest.approx(0.01)
    assert predict(Plan(1, 0.04)) == pytest.approx(0.04 * 1.5), "half way between the two on a logarithmic scale"
    assert predict(Plan(1, 0.5)) == pytest.approx(1.0)
