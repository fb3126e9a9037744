"""How the rollout holds its weights: the scheme of each value of `actor_rollout_ref.rollout.quantization`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from verl.config import RolloutConfig
from verl.workers.rollout.quantization.ascend import AscendScheme
from verl.workers.rollout.quantization.base import QuantizationScheme
from verl.workers.rollout.quantization.fp8 import Fp8Scheme
from verl.workers.rollout.quantization.none import NoQuantization
from verl.workers.rollout.quantization.torchao import TorchAOScheme

_SCHEMES: dict[str | None, type[QuantizationScheme]] = {
    None: NoQuantization,
    "fp8": Fp8Scheme,
    "torchao": TorchAOScheme,
    "ascend": AscendScheme,
}
# What an engine's worker has to know of `rollout`: it gets these as plain values, not the config.
_WORKER_FIELDS = ("quantization", "quantization_config_file", "quantization_side", "tensor_model_parallel_size")


def scheme_class(name: str | None) -> type[QuantizationScheme]:
    """The scheme of that name.

    Raises:
        ValueError: unknown, naming the allowed values.
    """
    if name not in _SCHEMES:
        raise ValueError(
            f"actor_rollout_ref.rollout.quantization={name!r}: use null or one of {', '.join(SCHEME_NAMES)}"
        )
    return _SCHEMES[name]


def get_scheme(rollout: RolloutConfig, model_dir: str) -> QuantizationScheme:
    """The scheme that `rollout.quantization` names, for the checkpoint in `model_dir`."""
    return scheme_class(rollout.quantization)(rollout, model_dir)


def worker_settings(rollout: RolloutConfig) -> dict[str, Any]:
    """What the engine's workers need of the rollout's config, in plain values."""
    return {name: getattr(rollout, name) for name in _WORKER_FIELDS}


def worker_scheme(settings: Mapping[str, Any], model_dir: str) -> QuantizationScheme:
    """The scheme in an engine's worker, by `worker_settings`."""
    return get_scheme(RolloutConfig(**settings), model_dir)


# The values that `rollout.quantization` may have besides null.
SCHEME_NAMES = tuple(name for name in _SCHEMES if name is not None)

__all__ = [
    "SCHEME_NAMES",
    "QuantizationScheme",
    "get_scheme",
    "scheme_class",
    "worker_scheme",
    "worker_settings",
]
