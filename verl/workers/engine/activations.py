"""Inputs of checkpointed layers, kept in host memory between forward and backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from verl.workers.engine.host_memory import HostMemory


class ActivationOffload:
    """Moves what a checkpointed layer keeps for its backward pass, its input [b, S, hidden], to the host.

    Copies run beside the computations. The backward pass of a layer starts to bring back the input of the layer before
    it, so that about two inputs are on the device at a time.
    """

    def __init__(self, memory: HostMemory):
        self._memory = memory
        self._last: Callable[[], _Kept | None] = lambda: None

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return the forward method `forward` of a checkpointed layer with its input on the host.

        Raises:
            NotImplementedError: when it is called without a positional argument, which is the input.
        """

        def run(*args: Any, **kwargs: Any) -> Any:
            if not args or not isinstance(args[0], torch.Tensor):
                raise NotImplementedError(
                    "a layer of this model gets its input by name, which is not supported with "
                    "model.enable_activation_offload=True; set it to False"
                )
            # Not the tensor itself: autograd keeps `pack`, and what it refers to, until the backward pass.
            address, shape = args[0].data_ptr(), args[0].shape

            def pack(tensor: torch.Tensor) -> torch.Tensor | _Kept:
                is_input = tensor.data_ptr() == address and tensor.shape == shape
                return self._keep(tensor) if is_input else tensor

            with saved_tensors_hooks(pack, _restore):
                return forward(*args, **kwargs)

        return run

    def _keep(self, tensor: torch.Tensor) -> _Kept:
        kept = _Kept(tensor, self._memory, self._last)
        self._last = weakref.ref(kept)
        return kept


class _Kept:
    """A tensor on the host.

    Args:
        previous: returns the tensor that is needed after this one; None if there is none.
    """

    def __init__(self, tensor: torch.Tensor, memory: HostMemory, previous: Callable[[], _Kept | None]):
        self._memory, self._previous = memory, previous
        self._loading: torch.Tensor | None = None
        self._loaded: Any = None
        self._block = memory.allocate(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        with memory.copying():
            self._block.copy_(tensor.detach(), non_blocking=True)
        memory.keep_until_copied(tensor)

    def start_loading(self) -> None:
        if self._loading is not None:
            return
        self._loading = torch.empty(self._block.shape, dtype=self._block.dtype, device=self._memory.device)
        with self._memory.copying():
            self._loading.copy_(self._block, non_blocking=True)
        self._memory.keep_until_copied(self._loading)
        self._loaded = self._memory.record()

    def restore(self) -> torch.Tensor:
        """Return the tensor on the device, and start to load the one that is needed next."""
        self.start_loading()
        self._memory.wait(self._loaded)
        tensor, self._loading = self._loading, None
        assert tensor is not None
        previous = self._previous()
        if previous is not None:
            previous.start_loading()
        return tensor


def _restore(kept: torch.Tensor | _Kept) -> torch.Tensor:
    return kept.restore() if isinstance(kept, _Kept) else kept
