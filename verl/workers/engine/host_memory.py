"""Copies of tensors in host memory, made and read by a stream of their own, beside the device's computations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.distributed.tensor import DTensor

# torch rounds pinned memory up to powers of 2, so a tensor of its own size could waste almost half of it.
_BLOCK_BYTES = 64 << 20


class HostMemory:
    """The host memory that offloaded tensors of a device are moved to.

    Args:
        device: this rank's device. On a CPU, copies are made at once, and memory is not pinned; only tests use that.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._module: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._stream: Any = None if self._module is None else self._module.Stream(device=device)

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Return uint8 [nbytes] on the host, pinned for an accelerator."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._module is not None)

    def copying(self) -> AbstractContextManager[Any]:
        """Return a context in which copies follow all computations that were started before it."""
        if self._module is None:
            return nullcontext()
        self._stream.wait_stream(self._module.current_stream(self.device))
        return self._module.stream(self._stream)

    def keep_until_copied(self, tensor: torch.Tensor) -> None:
        """Note that copies use a tensor of the device, so that its memory is not reused before they end."""
        if self._module is not None:
            tensor.record_stream(self._stream)

    def record(self) -> Any:
        """Return an event after all copies that were started; None on a CPU."""
        return None if self._module is None else self._stream.record_event()

    def wait(self, event: Any) -> None:
        """Make the device's later computations wait for an event of `record`."""
        if event is not None:
            self._module.current_stream(self.device).wait_event(event)


def host_memory(device: torch.device) -> HostMemory | None:
    """Return the host memory of an accelerator; None for a CPU, whose tensors are in host memory anyway."""
    return None if device.type == "cpu" else HostMemory(device)


class HostCopy:
    """Tensors that are either on the device or in host memory.

    The tensor objects stay, with all their views: only the memory behind them is freed and allocated again. Nothing may
    read or write them in between.

    Args:
        tensors: returns the tensors; `offload` calls it, so they may change while they are on the device.
    """

    def __init__(self, tensors: Callable[[], Iterable[torch.Tensor]], memory: HostMemory):
        self._tensors, self._memory = tensors, memory
        self._blocks: list[torch.Tensor] = []
        self._storages: list[tuple[torch.UntypedStorage, int]] = []
        self._changed, self._loaded = True, None

    @property
    def nbytes(self) -> int:
        """Bytes that were last moved to the host."""
        return sum(nbytes for _, nbytes in self._storages)

    def mark_changed(self) -> None:
        """Note that values have changed since they were last moved to the host."""
        self._changed = True

    def offload(self) -> None:
        """Free the tensors' memory on the device, after values that have changed were copied to the host."""
        held = _storages(self._tensors())
        on_device = [storage for storage in held if storage.nbytes()]
        if not on_device:
            return  # nothing exists yet, or everything is on the host
        assert len(on_device) == len(held), "tensors are created only while the others are on the device"
        self.wait()
        self._storages = [(storage, storage.nbytes()) for storage in held]
        with self._memory.copying():
            for part, block in self._parts() if self._changed else ():
                block.copy_(part, non_blocking=True)
        for storage in held:
            self._memory.keep_until_copied(_bytes_of(storage, self._memory.device))
            storage.resize_(0)
        self._changed = False

    def load(self) -> None:
        """Start to move everything back to the device; call `wait` before it is used."""
        if all(storage.nbytes() for storage, _ in self._storages):
            return
        for storage, nbytes in self._storages:
            storage.resize_(nbytes)
        with self._memory.copying():
            for part, block in self._parts():
                part.copy_(block, non_blocking=True)
        self._loaded = self._memory.record()

    def wait(self) -> None:
        """Let the device's later computations wait until `load` has finished."""
        self._memory.wait(self._loaded)
        self._loaded = None

    def _parts(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Iterate over parts of the storages and of the host's blocks, each uint8 and of equal size."""
        start = 0
        for storage, nbytes in self._storages:
            source, done = _bytes_of(storage, self._memory.device), 0
            while done < nbytes:
                number, offset = divmod(start, _BLOCK_BYTES)
                if number == len(self._blocks):
                    self._blocks.append(self._memory.allocate(_BLOCK_BYTES))
                size = min(nbytes - done, _BLOCK_BYTES - offset)
                yield source[done : done + size], self._blocks[number][offset : offset + size]
                done, start = done + size, start + size


def to_device(tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    """Return a tensor with this rank's part on `device`: itself if it is there, or if `device` is None."""
    if not isinstance(tensor, DTensor):
        return tensor if device is None else tensor.to(device)
    local = tensor.to_local()
    if device is None or local.device.type == device.type:
        return tensor
    return DTensor.from_local(
        local.detach().to(device),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def _storages(tensors: Iterable[torch.Tensor]) -> list[torch.UntypedStorage]:
    """Return the memory of this rank's parts of the tensors, each once."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return list(
        {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in local if tensor.numel()}.values()
    )


def _bytes_of(storage: torch.UntypedStorage, device: torch.device) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
