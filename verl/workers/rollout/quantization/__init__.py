"""How the rollout holds its weights: `actor_rollout_ref.rollout.quantization` is compared here and nowhere else."""

from __future__ import annotations

from verl.trainer.config import RolloutConfig
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


# The values that `rollout.quantization` may have besides null.
SCHEME_NAMES = tuple(name for name in _SCHEMES if name is not None)

__all__ = ["SCHEME_NAMES", "QuantizationScheme", "get_scheme", "scheme_class"]
