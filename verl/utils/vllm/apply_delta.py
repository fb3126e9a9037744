"""Change single elements of a running engine's weights, without a full reload.

If the position of a weight's elements in the kernel layout is known, they are written in place. Of the other weights
(packed for a kernel, quantized by the engine) the engine keeps a copy in host memory in the checkpoint layout: the
elements are changed there, and only the layers that are made from these copies are reloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn

from verl.utils.tensor_diff import bits
from verl.utils.vllm.layout_map import LayoutMap, Target, storage_of

# Elements that are written at the same time: it takes three int64 tensors of this length.
_ELEMENTS = 1 << 22


def _placement(tensor: torch.Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.size(), tensor.stride()


class DeltaApplier:
    """Writes the elements of deltas. Built from a recorded load.

    Call `apply_chunk` for each chunk, `refresh_derived` after each bucket, and `finish` after the last bucket.

    Args:
        model: the engine's model.
        layout: positions of the checkpoint tensors in the model.
        reloaded: layers that must be reloaded to change, by name.
        derived: layers that keep something computed from their weights: name -> function that computes it again.
        refresh: called with the written indices of parameters in a separate kernel layout: layer -> parameter ->
            int64 indices in the flattened parameter in the checkpoint layout.
        reload: loads checkpoint tensors into the given layers, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: LayoutMap,
        *,
        reloaded: Mapping[str, nn.Module],
        derived: Mapping[str, Callable[[], None]],
        refresh: Callable[[Mapping[str, Mapping[str, torch.Tensor]]], None],
        reload: Callable[[Mapping[str, nn.Module], Iterable[tuple[str, torch.Tensor]]], None],
    ):
        self._layers = dict(model.named_modules())
        self._reloaded, self._derived, self._refresh, self._reload = dict(reloaded), dict(derived), refresh, reload
        of_reloaded = {
            name for name, found in layout.regions.items() if any(target.layer in reloaded for target, _ in found)
        }
        # Copies in the checkpoint layout, by checkpoint name; None until a full load brings the tensor. Another rank
        # holds a tensor that is neither: a full update checks that some rank has read it.
        self._copies: dict[str, torch.Tensor | None] = dict.fromkeys(sorted(layout.opaque | of_reloaded))
        self._regions = {
            name: [(target, region) for target, region in found if target.layer not in reloaded]
            for name, found in layout.regions.items()
        }
        self._indices: dict[str, dict[str, list[torch.Tensor]]] = {}
        self._written_storages: set[int] = set()
        self._reload_due = False

    def keep(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy the tensors of a full load that are needed in the checkpoint layout."""
        for name, tensor in named_tensors:
            if name not in self._copies:
                continue
            copy = self._copies[name]
            # A load that was refused later may have brought another shape or dtype.
            if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
                self._copies[name] = tensor.detach().to("cpu", copy=True).contiguous()
            else:
                copy.copy_(tensor)

    @property
    def complete(self) -> bool:
        """Whether all needed copies have been made."""
        return all(copy is not None for copy in self._copies.values())

    @property
    def kept_bytes(self) -> int:
        """Host memory that the copies take."""
        return sum(copy.nbytes for copy in self._copies.values() if copy is not None)

    def moved_parameter(self) -> str | None:
        """Return the name of a parameter that is no longer in the recorded memory; None if there is none."""
        for target in self._targets():
            layer, key = self._layers[target.layer], target.name.rpartition(".")[2]
            parameter = layer._parameters.get(key)
            if parameter is None or _placement(parameter) != _placement(target.kernel_tensor):
                return target.name
        return None

    def _targets(self) -> Iterator[Target]:
        seen: set[str] = set()
        for found in self._regions.values():
            for target, _ in found:
                if target.name not in seen:
                    seen.add(target.name)
                    yield target

    @torch.no_grad()
    def apply_chunk(self, name: str, indices: torch.Tensor | None, start: int, values: torch.Tensor) -> None:
        """Write elements of a checkpoint tensor.

        Args:
            indices: int64 [count], ascending, in the flattened tensor; None for contiguous elements from `start`.
            values: [count], in the tensor's dtype.
        """
        raw = bits(values)
        copy = self._copies.get(name)
        if copy is not None:
            flat = bits(copy.view(-1))
            if indices is None:
                flat[start : start + raw.numel()] = raw
            else:
                flat[indices] = raw
            self._reload_due = True
        for begin in range(0, raw.numel(), _ELEMENTS):
            end = min(begin + _ELEMENTS, raw.numel())
            part = torch.arange(start + begin, start + end) if indices is None else indices[begin:end]
            for target, region in self._regions.get(name, ()):
                self._write(target, *region.locate(part), raw[begin:end])

    def _write(self, target: Target, indices: torch.Tensor, positions: torch.Tensor | None, raw: torch.Tensor) -> None:
        """Write `raw`, or its elements at `positions`, to `indices` of the flattened parameter."""
        if not indices.numel():
            return
        memory = target.memory()
        offsets = target.offsets(indices).to(memory.device)
        memory[offsets] = (raw if positions is None else raw[positions]).to(memory.device)
        self._written_storages.add(storage_of(memory))
        if target.steps:
            key = target.name.rpartition(".")[2]
            self._indices.setdefault(target.layer, {}).setdefault(key, []).append(indices)

    @torch.no_grad()
    def refresh_derived(self) -> None:
        """Compute again what is derived from the weights written since the last call."""
        self._refresh(
            {layer: {key: torch.cat(parts) for key, parts in keys.items()} for layer, keys in self._indices.items()}
        )
        for name, compute in self._derived.items():
            own = (p for p in self._layers[name]._parameters.values() if p is not None and p.numel())
            if not self._written_storages.isdisjoint(storage_of(parameter.data) for parameter in own):
                compute()
        self._indices, self._written_storages = {}, set()

    @torch.no_grad()
    def finish(self) -> None:
        """Reload the layers whose copies were changed, and refresh what is derived."""
        if self._reload_due:
            self._reload_due = False
            kept = [(name, copy) for name, copy in self._copies.items() if copy is not None]
            self._reload(self._reloaded, kept)
            for layer in self._reloaded.values():
                parameters = (p for p in layer._parameters.values() if p is not None and p.numel())
                self._written_storages |= {storage_of(parameter.data) for parameter in parameters} - {0}
        self.refresh_derived()
