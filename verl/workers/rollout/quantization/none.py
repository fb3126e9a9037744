"""No quantisation: the engine holds the weights as they are sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from verl.utils.vllm.ascend_description import DESCRIPTION_FILE
from verl.workers.rollout.quantization.base import QuantizationScheme


class NoQuantization(QuantizationScheme):
    """`rollout.quantization=null`."""

    def engine_overrides(self, device: str) -> dict[str, Any]:
        description = Path(self._model_dir) / DESCRIPTION_FILE
        if device == "npu" and description.exists():
            raise ValueError(
                f"actor_rollout_ref.rollout.quantization=null: vllm-ascend takes {description} for the wish to "
                "quantise all the same; set quantization=ascend, or move that file away"
            )
        return {}

    def summary(self) -> str:
        return "not quantised"
