"""Weights and optimizer state of a model that are in host memory while no method of its engine needs them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from verl.workers.engine.host_memory import HostCopy, HostMemory


class OffloadedState:
    """The state that an engine moves to the host between its phases; nothing without `memory`.

    Args:
        optimizer: None for an engine without an optimizer.
        memory: host memory; None to leave everything on the device.
        weights, moments: move the parameters, and the optimizer's state.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
        memory: HostMemory | None,
        *,
        weights: bool,
        moments: bool,
    ):
        self._weights: list[HostCopy] = []
        self._moments: list[HostCopy] = []
        self._changing: list[HostCopy] = []
        if memory is not None and weights:
            trained = HostCopy(lambda: (p for p in model.parameters() if p.requires_grad), memory)
            frozen = HostCopy(lambda: (p for p in model.parameters() if not p.requires_grad), memory)
            self._weights, self._changing = [trained, frozen], [trained]
        if memory is not None and moments and optimizer is not None:
            self._moments = [HostCopy(lambda: _state_tensors(optimizer), memory)]
            self._changing += self._moments

    def load_weights(self) -> None:
        """Make the parameters usable on the device."""
        for copy in self._weights:
            copy.load()
            copy.wait()

    def start_loading_moments(self) -> None:
        """Move the optimizer's state to the device while it computes; `load_moments` must follow."""
        for copy in self._moments:
            copy.load()

    def load_moments(self) -> None:
        """Make the optimizer's state usable on the device."""
        for copy in self._moments:
            copy.load()
            copy.wait()

    def mark_changed(self) -> None:
        """Note that trained parameters and the optimizer's state have new values."""
        for copy in self._changing:
            copy.mark_changed()

    def release(self) -> None:
        """Move everything to the host. The copies end later; until then the memory is not used again."""
        for copy in (*self._weights, *self._moments):
            copy.offload()


def _state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Iterate over the optimizer's state without its step counters."""
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor) and value.dim())
