"""`rollout.quantization=torchao`: the engine quantizes the weights that it loads, by torchao's own JSON config."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from verl.utils.model_dir.index import read_json_object
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
        """Read the config, and let torchao read it if it is installed."""
        path, config = self._config_file, self._read_config()
        if not installed:
            return
        if find_spec("torchao") is None:
            raise ValueError(f"{FIELD}=torchao: torchao is not installed; pip install torchao")
        from torchao.core.config import config_from_dict

        try:
            config_from_dict(config)
        except (ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
            raise ValueError(f"{_FILE}={path}: torchao rejects it: {error}; correct its _data") from error

    def _read_config(self) -> dict[str, Any]:
        """Return the content of the file; ValueError if it has not the form of a config of torchao."""
        path = self._config_file
        try:
            config = read_json_object(path, unique_keys=True)
        except ValueError as error:
            raise ValueError(f"{_FILE}={error}") from error
        except OSError as error:
            raise ValueError(f"{_FILE}={path}: cannot be read ({error.strerror})") from error
        if not isinstance(config.get("_type"), str):
            raise ValueError(f"{_FILE}={path}: not a torchao config, it has no _type; see torchao.core.config")
        for name, kind, expected in (("_version", int, "a whole number"), ("_data", dict, "an object")):
            value = config.get(name, kind())
            if type(value) is not kind:
                raise ValueError(f"{_FILE}={path}: {name}={value!r:.80} must be {expected}; correct it")
        return config

    @property
    def _config_file(self) -> Path:
        assert self.settings.quantization_config_file is not None, "validate_settings first"
        return Path(self.settings.quantization_config_file)

    def _engine_arguments(self) -> dict[str, Any]:
        path = str(self._config_file.resolve())
        return {"quantization": "torchao", "hf_overrides": {"quantization_config_file": path}}

    def summary(self) -> str:
        return f"torchao, by {self.settings.quantization_config_file}; the engine quantizes"
