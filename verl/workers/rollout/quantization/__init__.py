"""The tensor half of each value of `rollout.quantization`: encoding, checks on arrival, layouts of the engine's layers.

The torch-free half, with requirements, vLLM arguments and sizes, is in verl.utils.quantization.schemes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TypedDict

from verl.config import RolloutConfig
from verl.utils.quantization.schemes import registered_scheme, weight_format
from verl.utils.quantization_scheme import QuantizationScheme


class WorkerSettings(TypedDict, total=False):
    """The keys of `rollout` that an engine's worker needs to build its scheme. A missing key has its default."""

    quantization: str | None
    quantization_scheme: str | None
    quantization_config_file: str | None
    quantization_side: str
    tensor_model_parallel_size: int
    expert_parallel_size: int


def scheme_class(name: str | None) -> type[QuantizationScheme]:
    """Return the tensor half of a value of `rollout.quantization`.

    Raises:
        ValueError: an unknown value; the message lists the allowed ones.
    """
    module, _, attribute = registered_scheme(name).tensor_half.partition(":")
    scheme = getattr(import_module(f"{__name__}.{module}"), attribute)
    assert issubclass(scheme, QuantizationScheme)
    return scheme


def get_scheme(rollout: RolloutConfig, model_dir: str) -> QuantizationScheme:
    """Return the scheme that `rollout.quantization` selects, for the checkpoint in `model_dir`."""
    return scheme_class(rollout.quantization)(weight_format(rollout, model_dir))


def worker_settings(rollout: RolloutConfig) -> WorkerSettings:
    """Return the settings that an engine's worker receives in place of the config."""
    return {
        "quantization": rollout.quantization,
        "quantization_scheme": rollout.quantization_scheme,
        "quantization_config_file": rollout.quantization_config_file,
        "quantization_side": rollout.quantization_side,
        "tensor_model_parallel_size": rollout.tensor_model_parallel_size,
        "expert_parallel_size": rollout.expert_parallel_size,
    }


def worker_scheme(settings: WorkerSettings, model_dir: str) -> QuantizationScheme:
    """Build the scheme in an engine's worker from its `worker_settings`."""
    return get_scheme(RolloutConfig(**settings), model_dir)


__all__ = ["WorkerSettings", "get_scheme", "scheme_class", "worker_scheme", "worker_settings"]
