"""Nothing is profiled; only names that are imported."""

from torch_npu.profiler import dynamic_profile

__all__ = ["dynamic_profile"]
