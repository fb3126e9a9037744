"""`rollout.quantization=null`: the engine holds the weights in its own dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from verl.utils.quantization.ascend_description import DESCRIPTION_FILE
from verl.utils.quantization.schemes.base import FIELD, WeightFormat


class UnquantizedFormat(WeightFormat):
    """No quantization."""

    name = None

    def validate_settings(self, device: str) -> None:
        super().validate_settings(device)
        description = Path(self.model_dir) / DESCRIPTION_FILE
        if device == "npu" and description.exists():
            raise ValueError(
                f"{FIELD}=null: vllm-ascend would quantize all the same, because of {description}; set "
                "quantization=ascend, or move that file away"
            )

    def _engine_arguments(self) -> dict[str, Any]:
        return {}

    def summary(self) -> str:
        return "not quantized"

    @classmethod
    def estimated_bytes(cls, parameters: int, itemsize: int, scheme: str | None = None) -> int:
        return parameters * itemsize
