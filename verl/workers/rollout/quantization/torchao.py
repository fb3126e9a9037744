"""`rollout.quantization=torchao`: the engine quantizes what it loads, as torchao's own JSON config says."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from verl.utils.quantization.requirements import validate_config_file, validate_device
from verl.workers.rollout.quantization.base import QuantizationScheme

_SETTING = "actor_rollout_ref.rollout.quantization=torchao"
_FILE = "actor_rollout_ref.rollout.quantization_config_file"


class TorchAOScheme(QuantizationScheme):
    """Weights travel as they are; each layer is quantized again after each update, by vLLM's layer-wise reload."""

    def engine_overrides(self, device: str) -> dict[str, Any]:
        path = self._rollout.quantization_config_file
        validate_config_file("torchao", path)
        if find_spec("torchao") is None:
            raise ValueError(f"{_SETTING}: torchao is not installed; pip install torchao")
        try:
            config = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{_FILE}={path}: cannot be read as JSON: {error}") from error
        if not isinstance(config, dict) or not isinstance(config.get("_type"), str):
            raise ValueError(f"{_FILE}={path}: is no torchao config: it has no _type; see torchao.core.config")
        from torchao.core.config import config_from_dict

        try:
            config_from_dict(config)
        except ValueError as error:
            raise ValueError(f"{_FILE}={path}: torchao does not take it: {error}") from error
        validate_device("torchao", device)
        return {"quantization": "torchao", "hf_overrides": {"quantization_config_file": str(Path(path).resolve())}}

    def summary(self) -> str:
        file = self._rollout.quantization_config_file
        return f"torchao, as {file} says; the engine quantizes, whatever quantization_side is"
