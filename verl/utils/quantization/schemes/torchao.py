"""`rollout.quantization=torchao`: the engine quantizes the weights that it loads, by torchao's own JSON config."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from verl.utils.quantization.schemes.base import FIELD, WeightFormat

_FILE = f"{FIELD}_config_file"


class TorchAOFormat(WeightFormat):
    """The config file determines the number format. The engine quantizes with both values of `quantization_side`."""

    name = "torchao"
    devices = ("cpu", "cuda")
    alternative = "ascend"

    def validate_settings(self, device: str) -> None:
        if self.settings.quantization_config_file is None:
            raise ValueError(
                f"{FIELD}=torchao needs {_FILE}: the JSON that torchao.core.config.config_to_dict gives, for example "
                '{"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}'
            )
        super().validate_settings(device)

    def _validate_engine(self, device: str, installed: bool) -> None:
        """Let torchao read its config."""
        if not installed:
            return
        path = self._config_file
        if find_spec("torchao") is None:
            raise ValueError(f"{FIELD}=torchao: torchao is not installed; pip install torchao")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{_FILE}={path}: cannot be read as JSON: {error}") from error
        if not isinstance(config, dict) or not isinstance(config.get("_type"), str):
            raise ValueError(f"{_FILE}={path}: not a torchao config, it has no _type; see torchao.core.config")
        from torchao.core.config import config_from_dict

        try:
            config_from_dict(config)
        except ValueError as error:
            raise ValueError(f"{_FILE}={path}: torchao rejects it: {error}") from error

    @property
    def _config_file(self) -> Path:
        assert self.settings.quantization_config_file is not None, "validate_settings first"
        return Path(self.settings.quantization_config_file)

    def _engine_arguments(self) -> dict[str, Any]:
        path = str(self._config_file.resolve())
        return {"quantization": "torchao", "hf_overrides": {"quantization_config_file": path}}

    def summary(self) -> str:
        return f"torchao, by {self.settings.quantization_config_file}; the engine quantizes"
