"""Choices of layers: the fewest bytes for each sum of costs."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Option:
    """One way to quantize a unit.

    Attributes:
        unit: name of the unit.
        scheme: its format.
        saved: bytes that it saves.
        cost: KL divergence if nothing else is quantized, in nats per token.
    """

    unit: str
    scheme: str
    saved: int
    cost: float


@dataclass(frozen=True, eq=False)
class Plan:
    """A choice of options, at most one for each unit.

    Attributes:
        saved: sum of the saved bytes.
        cost: sum of the costs.
        last: the option added last; None for the plan that quantizes nothing.
        rest: the other options; None for the plan that quantizes nothing.
    """

    saved: int = 0
    cost: float = 0.0
    last: Option | None = None
    rest: Plan | None = field(default=None, repr=False)

    @property
    def options(self) -> list[Option]:
        """The options, the one added last first."""
        found = []
        plan: Plan | None = self
        while plan is not None:
            if plan.last is not None:
                found.append(plan.last)
            plan = plan.rest
        return found

    @property
    def schemes(self) -> dict[str, str]:
        """Name of each quantized unit -> its scheme."""
        return {option.unit: option.scheme for option in self.options}


def best_plans(options: Iterable[Option]) -> list[Plan]:
    """Return every plan for which no other one saves at least as many bytes at a smaller sum of costs.

    This is the exact solution of the knapsack problem for every budget, by dynamic programming over the units. There
    are at most as many plans as different sums of saved bytes, which are few, because layers of a kind have equal
    sizes.

    Returns:
        Plans in ascending order of saved bytes and of costs. The first one quantizes nothing.
    """
    by_unit: dict[str, list[Option]] = {}
    for option in options:
        by_unit.setdefault(option.unit, []).append(option)
    plans = [Plan()]
    for choices in by_unit.values():
        grown = [
            Plan(plan.saved + option.saved, plan.cost + option.cost, option, plan)
            for plan in plans
            for option in choices
        ]
        plans = _undominated(plans + grown)
    return plans if plans[0].last is None else [Plan(), *plans]


def _undominated(plans: list[Plan]) -> list[Plan]:
    kept: list[Plan] = []
    cheapest = math.inf
    for plan in sorted(plans, key=lambda plan: (-plan.saved, plan.cost)):
        if plan.cost < cheapest:
            kept.append(plan)
            cheapest = plan.cost
    return kept[::-1]


class Prediction:
    """Predicts the KL divergence of plans from their sums of costs and from the plans measured so far.

    Costs add up only approximately: the KL divergence is quadratic in the change of the logits, so independent changes
    add, but one layer's change alters the inputs of the next. The ratio of the measured divergence to the sum depends
    smoothly on the sum. It is 1 for a single unit, and between measured plans it is interpolated over the logarithm of
    the sum.

    Args:
        smallest: cost of the cheapest unit, above 0.
    """

    def __init__(self, smallest: float):
        self._ratios = {smallest: 1.0}

    def learn(self, plan: Plan, measured: float) -> None:
        """Take a measured plan into account."""
        if plan.cost > 0:
            self._ratios[plan.cost] = measured / plan.cost

    def __call__(self, plan: Plan) -> float:
        """Return the predicted KL divergence of a plan in nats per token."""
        if plan.cost <= 0:
            return 0.0
        known = sorted(self._ratios)
        after = bisect.bisect_left(known, plan.cost)
        if after in (0, len(known)):
            return plan.cost * self._ratios[known[min(after, len(known) - 1)]]
        low, high = known[after - 1], known[after]
        weight = math.log(plan.cost / low) / math.log(high / low)
        return plan.cost * ((1 - weight) * self._ratios[low] + weight * self._ratios[high])
