"""The names of the compiled module that Python code imports."""

from torch_npu._C import _distributed_c10d

__all__ = ["_distributed_c10d"]
