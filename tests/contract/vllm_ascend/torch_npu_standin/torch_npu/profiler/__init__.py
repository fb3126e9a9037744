"""Names that are imported; nothing is profiled."""

from torch_npu.profiler import dynamic_profile

__all__ = ["dynamic_profile"]
