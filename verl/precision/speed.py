"""Tokens per second of an engine that is limited by reading its weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

from verl.precision.plans import Plan
from verl.utils.quantization.ascend_description.units import ITEMSIZE, PrecisionUnits
from verl.utils.quantization.ascend_layers import EMBEDDING, HEAD, PREDICTION, TOWER, Layer


class Speed:
    """Bytes of weights that an engine reads for one token of one sequence.

    All weights, without those that a text token does not use: the embedding (of which it reads one row, unless the
    embedding is the output head too), experts that are not chosen, vision and audio towers, layers that predict further
    tokens. The cache is not included.

    Args:
        units: of the model.
        bandwidth: bytes that all devices of an engine read per second.
    """

    def __init__(self, units: PrecisionUnits, bandwidth: float):
        self._bandwidth = bandwidth
        chosen, number = units.index.text_config.get("num_experts_per_tok"), _numbers_of_experts(units.layers)
        tied = any(layer.reason == HEAD and not layer.info.shape[0] for layer in units.layers)

        def share(layer: Layer) -> float:
            if layer.reason in (TOWER, PREDICTION) or (layer.reason == EMBEDDING and not tied):
                return 0.0
            return min(1.0, chosen / number[layer.experts]) if layer.experts and isinstance(chosen, int) else 1.0

        unread = sum((1 - share(layer)) * ITEMSIZE * math.prod(layer.info.shape) for layer in units.layers)
        self._unquantized = units.unquantized_nbytes - unread
        self._shares = {unit.name: share(unit.layers[0]) for unit in units.units}

    def bytes_per_token(self, plan: Plan) -> float:
        """Return the bytes that are read with the units of a plan quantized."""
        return self._unquantized - sum(option.saved * self._shares[option.unit] for option in plan.options)

    def tokens_per_second(self, plan: Plan) -> float:
        """Return the largest number of tokens per second of one sequence."""
        return self._bandwidth / self.bytes_per_token(plan)


def _numbers_of_experts(layers: Iterable[Layer]) -> dict[str, int]:
    """Return the number of experts by the name of their module."""
    numbers: dict[str, int] = {}
    for layer in layers:
        if layer.expert is not None:
            stored = layer.info.shape[0] if len(layer.info.shape) == 3 else layer.expert + 1
            numbers[layer.experts] = max(numbers.get(layer.experts, 0), stored)
    return numbers
