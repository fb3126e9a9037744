"""No quantisation: the engine holds the weights as they are sent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from verl.workers.rollout.quantization.base import QuantizationScheme


class NoQuantization(QuantizationScheme):
    """`rollout.quantization=null`."""

    def engine_overrides(self, device: str) -> dict[str, Any]:
        return {}

    def encode(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        yield from named_tensors
