"""Record which parts of a model's parameters are written while weights are loaded into them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from verl.utils.vllm.layout_map import storage_of

_QUANTIZED_DTYPES = (torch.float8_e4m3fn, torch.uint8)
# Storage offset, shape and stride of a write.
_Region = tuple[int, torch.Size, tuple[int, ...]]


class WriteLog(TorchDispatchMode):
    """Context manager that records every copy into some parameters, by any loader.

    Args:
        parameters: the parameters to watch, by engine name. No two of them share memory.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        super().__init__()
        self._sizes = {name: parameter.numel() for name, parameter in parameters.items()}
        self._names = {p.data.untyped_storage().data_ptr(): name for name, p in parameters.items() if p.numel()}
        assert len(self._names) == sum(size > 0 for size in self._sizes.values()), "parameters share memory"
        self._regions: dict[str, dict[_Region, int]] = {name: {} for name in parameters}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and not args[0].is_meta:
            address = args[0].untyped_storage().data_ptr()
            name = self._names.get(address)
            # The reload copies parameters that it left in place onto themselves.
            if name is not None and storage_of(args[1]) != address:
                self._record(name, args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _record(self, name: str, target: torch.Tensor, source: torch.Tensor) -> None:
        if target.dtype in _QUANTIZED_DTYPES and source.dtype != target.dtype:
            # copy_ would convert: unquantized weights to e4m3 without a scale, or scales that are not E8M0 to bytes.
            raise ValueError(f"{name} holds {target.dtype}, but was sent {source.dtype}: quantize it before sending")
        self._regions[name][int(target.storage_offset()), target.shape, target.stride()] = target.numel()

    def unwritten(self) -> list[str]:
        """Return the names of parameters that were not written completely; a partial write is marked."""
        names = []
        for name, size in self._sizes.items():
            written = sum(self._regions[name].values())
            if written < size:
                names.append(f"{name} (in part)" if written else name)
        return names
