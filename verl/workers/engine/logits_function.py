"""The operations of a model on the logits of its output head, element by element: scaling and soft-capping."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

_SMALL, _LARGE = 2.0**-10, 2.0**20  # far below and far above the cap of any model
_TOLERANCE = 1e-5  # relative, of float32


@dataclass(frozen=True)
class LogitsFunction:
    """The function y = cap * tanh(scale * x / cap), or y = scale * x without a cap.

    Gemma, Cohere, Granite, Falcon-H1 and others differ only in these two numbers.
    """

    scale: float = 1.0
    cap: float | None = None

    def apply_(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the function in place, in the dtype of x."""
        if self.scale != 1.0:
            x.mul_(self.scale)
        return x if self.cap is None else x.div_(self.cap).tanh_().mul_(self.cap)

    def backward_(self, gradient: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Multiply the gradient of y by the derivative dy/dx in place; y is the function's result."""
        if self.cap is not None:
            gradient.mul_(1.0 - (y / self.cap).square_())
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


def probe(width: int, device: torch.device) -> torch.Tensor:
    """Return values [width] float32 of all magnitudes and both signs, from whose images `fit` finds the function."""
    values = torch.logspace(math.log2(_SMALL), math.log2(_LARGE), width, base=2.0, device=device)
    values[1::2] *= -1.0
    return values


def fit(values: torch.Tensor, images: torch.Tensor) -> LogitsFunction | None:
    """Return the function that maps `values`, made by `probe`, to `images` [width]; None if it is another one."""
    x, y = values.detach().double(), images.detach().double()
    first, last = y[0].item(), y[-1].item()
    if not math.isfinite(first) or not math.isfinite(last) or first == 0 or last == 0:
        return None
    scale = first / x[0].item()
    found = LogitsFunction(_near_one(scale))
    if abs(last / x[-1].item() - scale) > _TOLERANCE * abs(scale):
        cap = abs(last)
        if abs(first) >= cap:
            return None
        found = LogitsFunction(_near_one(cap * math.atanh(first / cap) / x[0].item()), cap)
    error = (found.apply_(x) - y).abs()
    return found if bool((error <= _TOLERANCE * (1.0 + y.abs())).all()) else None


def _near_one(scale: float) -> float:
    return 1.0 if abs(scale - 1.0) < _TOLERANCE else scale
