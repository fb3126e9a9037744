"""Plugins of operators."""

from torch_npu.op_plugin import atb

__all__ = ["atb"]
