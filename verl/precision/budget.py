"""Finds the layers to quantize: the fewest bytes for which the KL divergence stays within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from verl.precision.plans import Option, Plan, Prediction, best_plans
from verl.utils.quantization.ascend_description.units import PrecisionUnits

# Sums of costs, relative to that of the plan with the most layers, of the plans that are measured for the curve; in
# ascending order, so that each one improves the prediction of the next.
_CURVE = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
# After this number of plans that fit or do not fit the budget, the search takes the best one that fits.
_ROUNDS = 8
# A plan that uses this part of the budget is not improved further: the next one would save hardly any bytes.
_CLOSE = 0.98


@dataclass(frozen=True)
class MeasuredPlan:
    """A plan with its KL divergences, in nats per token.

    Attributes:
        predicted: before the plan was measured.
        measured: with all of its layers quantized together.
    """

    plan: Plan
    predicted: float
    measured: float


@dataclass(frozen=True)
class Search:
    """Result of a search.

    Attributes:
        options: every way to quantize a unit, with its cost.
        plans: see `best_plans`.
        predict: prediction that knows all measured plans.
        measured: the measured plans, in ascending order of saved bytes.
        chosen: of those within the budget, the one that saves the most bytes.
    """

    options: Sequence[Option]
    plans: Sequence[Plan]
    predict: Prediction
    measured: Sequence[MeasuredPlan]
    chosen: MeasuredPlan


def measure_options(
    units: PrecisionUnits, kl: Callable[[Mapping[str, str]], float], progress: Callable[[int, int], None]
) -> list[Option]:
    """Measure each unit alone, in each of its schemes.

    Args:
        kl: returns the KL divergence with some units quantized: name of a unit -> its scheme.
        progress: called with the number of finished and of all measurements.
    """
    pairs = [(unit, scheme) for unit in units.units for scheme in unit.saved]
    options = []
    for number, (unit, scheme) in enumerate(pairs, start=1):
        options.append(Option(unit.name, scheme, unit.saved[scheme], kl({unit.name: scheme})))
        progress(number, len(pairs))
    return options


def search(options: Sequence[Option], kl: Callable[[Mapping[str, str]], float], budget: float) -> Search:
    """Find the plan that saves the most bytes and whose measured KL divergence is within the budget.

    Plans for the curve are measured first. Then the largest plan with a prediction within the budget is measured; the
    result corrects the predictions and limits the search from one side, until no plan is left between one that fits and
    one that does not, or after some rounds.

    Args:
        options: see `measure_options`.
        kl: see `measure_options`.
        budget: largest allowed KL divergence, in nats per token.

    Raises:
        ValueError: no layer can be quantized within the budget; the message has the smallest one that can be met.
    """
    plans = best_plans(options)
    least = min(options, key=lambda option: option.cost)
    if least.cost > budget:
        raise _unmet(budget, least, least.cost)
    predict = Prediction(min((option.cost for option in options if option.cost > 0), default=1.0))
    measured: dict[int, MeasuredPlan] = {}

    def measure(number: int) -> bool:
        """Measure a plan unless that was done before; return whether it is within the budget."""
        if number not in measured:
            plan, predicted = plans[number], predict(plans[number])
            measured[number] = MeasuredPlan(plan, predicted, kl(plan.schemes))
            predict.learn(plan, measured[number].measured)
        return measured[number].measured <= budget

    for share in _CURVE:
        measure(min(range(1, len(plans)), key=lambda n: abs(plans[n].cost - share * plans[-1].cost)))
    # Plan 0 quantizes nothing, so it fits.
    fits = max((n for n in measured if measure(n)), default=0)
    fails = min((n for n in measured if n > fits), default=len(plans))
    rounds = 0
    while fails - fits > 1 and not (fits and (rounds >= _ROUNDS or measured[fits].measured > _CLOSE * budget)):
        within = [n for n in range(fits + 1, fails) if predict(plans[n]) <= budget]
        # Where the predictions decide nothing any more, halve the rest.
        number = max(within, default=fits + 1) if rounds < _ROUNDS else (fits + fails) // 2
        if measure(number):
            fits = number
        else:
            fails = number
        rounds += 1
    if not fits:
        raise _unmet(budget, least, measured[1].measured)
    found = [measured[number] for number in sorted(measured)]
    return Search(options, plans, predict, found, measured[fits])


def _unmet(budget: float, least: Option, cost: float) -> ValueError:
    return ValueError(
        f"--budget kl={budget:g}: cannot be met: the least sensitive layers, {least.unit}, alone cost {cost:.3g} in "
        f"{least.scheme}; the smallest budget that can be met is kl={_rounded_up(cost)}; or set "
        "actor_rollout_ref.rollout.quantization=null"
    )


def _rounded_up(value: float) -> str:
    """Return a decimal number of two digits that is not smaller."""
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / step) * step:.2g}"
