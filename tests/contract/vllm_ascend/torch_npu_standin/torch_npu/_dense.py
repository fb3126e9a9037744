"""Operators without quantization, and names that must exist but are never called."""

import torch
import torch.nn.functional as F


def npu_swiglu(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Return silu of the first half times the second half."""
    gate, up = x.chunk(2, dim=dim)
    return F.silu(gate) * up


def npu_rms_norm(x: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (normalized, reciprocal root mean square)."""
    wide = x.float()
    reciprocal = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * reciprocal).to(x.dtype) * gamma, reciprocal


def npu_add_rms_norm(
    x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (normalized sum, reciprocal root mean square, sum)."""
    total = x1 + x2
    return *npu_rms_norm(total, gamma, epsilon), total


def npu_fusion_attention(*_, **__):
    """Not supported; transformers imports it."""
    raise NotImplementedError("npu_fusion_attention: the stand-in has no attention")


def npu_rotary_mul(*_, **__):
    """Not supported; transformers imports it."""
    raise NotImplementedError("npu_rotary_mul: the stand-in has no rotary embedding")
