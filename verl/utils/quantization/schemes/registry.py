"""The values of `actor_rollout_ref.rollout.quantization`, each with the two halves of its scheme.

A new scheme is a `WeightFormat` in this folder, a `QuantizationScheme` in verl.workers.rollout.quantization, and one
entry here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from verl.utils.model_dir.index import CheckpointIndex
from verl.utils.quantization.schemes.ascend import AscendFormat
from verl.utils.quantization.schemes.base import FIELD, RolloutSettings, WeightFormat
from verl.utils.quantization.schemes.fp8 import Fp8Format
from verl.utils.quantization.schemes.torchao import TorchAOFormat
from verl.utils.quantization.schemes.unquantized import UnquantizedFormat


@dataclass(frozen=True)
class RegisteredScheme:
    """The two halves of a scheme.

    Attributes:
        weight_format: the torch-free half.
        tensor_half: module and class of the other half, relative to verl.workers.rollout.quantization. A string,
            because only processes that hold tensors import it.
    """

    weight_format: type[WeightFormat]
    tensor_half: str


_SCHEMES = {
    None: RegisteredScheme(UnquantizedFormat, "pass_through:PassThroughScheme"),
    "fp8": RegisteredScheme(Fp8Format, "fp8:Fp8Scheme"),
    "torchao": RegisteredScheme(TorchAOFormat, "pass_through:PassThroughScheme"),
    "ascend": RegisteredScheme(AscendFormat, "ascend:AscendScheme"),
}
# The values of `rollout.quantization` other than null.
SCHEME_NAMES = tuple(name for name in _SCHEMES if name is not None)


def registered_scheme(name: str | None) -> RegisteredScheme:
    """Return the entry of a value of `rollout.quantization`.

    Raises:
        ValueError: an unknown value; the message lists the allowed ones.
    """
    if name not in _SCHEMES:
        raise ValueError(f"{FIELD}={name!r}: must be null or one of {', '.join(SCHEME_NAMES)}")
    return _SCHEMES[name]


def weight_format_class(name: str | None) -> type[WeightFormat]:
    """Return the torch-free half of a scheme; ValueError for an unknown name."""
    return registered_scheme(name).weight_format


def weight_format(
    settings: RolloutSettings, model_dir: str | Path, read_index: Callable[[], CheckpointIndex] | None = None
) -> WeightFormat:
    """Return the format that `settings.quantization` selects; arguments as of `WeightFormat`."""
    return weight_format_class(settings.quantization)(settings, model_dir, read_index)
