"""What Python code imports of the compiled module."""

from torch_npu._C import _distributed_c10d

__all__ = ["_distributed_c10d"]
