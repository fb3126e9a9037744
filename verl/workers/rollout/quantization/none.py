"""No quantization: the engine holds the weights as they are sent."""

from __future__ import annotations

from typing import Any

from verl.utils.quantization.requirements import validate_description
from verl.workers.rollout.quantization.base import QuantizationScheme


class NoQuantization(QuantizationScheme):
    """`rollout.quantization=null`."""

    def engine_overrides(self, device: str) -> dict[str, Any]:
        validate_description(self._model_dir, device)
        return {}

    def summary(self) -> str:
        return "not quantized"
