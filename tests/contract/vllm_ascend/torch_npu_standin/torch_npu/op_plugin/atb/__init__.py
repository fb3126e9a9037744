"""Ascend transformer boost."""

from torch_npu.op_plugin.atb import _atb_ops

__all__ = ["_atb_ops"]
