"""The torch-free half of each value of `rollout.quantization`: requirements, vLLM arguments, sizes.

The tensor half of each scheme is in verl.workers.rollout.quantization.
"""

from verl.utils.quantization.schemes.base import RolloutSettings, WeightFormat
from verl.utils.quantization.schemes.registry import (
    SCHEME_NAMES,
    registered_scheme,
    weight_format,
    weight_format_class,
)

__all__ = [
    "SCHEME_NAMES",
    "RolloutSettings",
    "WeightFormat",
    "registered_scheme",
    "weight_format",
    "weight_format_class",
]
