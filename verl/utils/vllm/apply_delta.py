"""Changes single elements of a running engine's weights, without a reload.

Where a weight is run as it was sent, or in a layout that is known, its elements are written where they are. Of the
others (packed for a kernel, quantized by the engine) the engine keeps the checkpoint's form in host memory: changes are
made there, and the layers that are made from it are loaded again, they alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn

from verl.utils.tensor_diff import bits
from verl.utils.vllm.layout_map import LayoutMap, Target, storage_of

# Elements that are placed at a time: three int64 tensors of this length.
_CHUNK = 1 << 22


def _place(tensor: torch.Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.size(), tensor.stride()


class DeltaApplier:
    """Made from a recorded load; `patch` for each change, `settle` now and then, `finish`.

    Args:
        model: the engine's model.
        layout: where each checkpoint tensor is.
        reloaded: layers that have to be loaded again to change, by name.
        derived: layers that make something of weights that they share, or keep, and how to make it anew.
        refresh: told, by layer and parameter, which places of layers in a layout of their own were written.
        reload: loads checkpoint tensors into some layers, by name.
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
        # A layer that is loaded again may have been made, in a way that was not seen, of what was not seen to be taken.
        unseen = layout.names - layout.regions.keys() if reloaded else set()
        self._shadows: dict[str, torch.Tensor | None] = dict.fromkeys(sorted(layout.opaque | of_reloaded | unseen))
        self._regions = {
            name: [(target, region) for target, region in found if target.layer not in reloaded]
            for name, found in layout.regions.items()
        }
        self._places: dict[str, dict[str, list[torch.Tensor]]] = {}
        self._touched: set[int] = set()
        self._reload_due = False

    def keep(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take the checkpoint's form of what has to be loaded again, out of a whole load."""
        for name, tensor in named_tensors:
            if name not in self._shadows:
                continue
            shadow = self._shadows[name]
            if shadow is None:
                self._shadows[name] = tensor.detach().to("cpu", copy=True).contiguous()
            else:
                shadow.copy_(tensor)

    @property
    def complete(self) -> bool:
        """Whether every form that is needed has been kept."""
        return all(shadow is not None for shadow in self._shadows.values())

    @property
    def kept_bytes(self) -> int:
        """Host memory that the kept forms take."""
        return sum(shadow.nbytes for shadow in self._shadows.values() if shadow is not None)

    def moved(self) -> str | None:
        """A parameter whose memory is not the one that was recorded."""
        for target in self._targets():
            layer, key = self._layers[target.layer], target.name.rpartition(".")[2]
            parameter = layer._parameters.get(key)
            if parameter is None or _place(parameter) != _place(target.run):
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
    def patch(self, name: str, places: torch.Tensor | None, start: int, values: torch.Tensor) -> None:
        """Write elements of a checkpoint tensor.

        Args:
            places: int64 [count] ascending, in the flattened tensor; None for those from `start` on.
            values: [count], in its dtype.
        """
        raw = bits(values)
        shadow = self._shadows.get(name)
        if shadow is not None:
            flat = bits(shadow.view(-1))
            if places is None:
                flat[start : start + raw.numel()] = raw
            else:
                flat[places] = raw
            self._reload_due = True
        for begin in range(0, raw.numel(), _CHUNK):
            end = min(begin + _CHUNK, raw.numel())
            chunk = torch.arange(start + begin, start + end) if places is None else places[begin:end]
            for target, region in self._regions.get(name, ()):
                self._write(target, *region.locate(chunk), raw[begin:end])

    def _write(self, target: Target, at: torch.Tensor, which: torch.Tensor | None, raw: torch.Tensor) -> None:
        if not at.numel():
            return
        memory = target.memory()
        offsets = target.offsets(at).to(memory.device)
        memory[offsets] = (raw if which is None else raw[which]).to(memory.device)
        self._touched.add(storage_of(memory))
        if target.steps:
            key = target.name.rpartition(".")[2]
            self._places.setdefault(target.layer, {}).setdefault(key, []).append(at)

    @torch.no_grad()
    def settle(self) -> None:
        """Make anew what is derived from what was written since the last time."""
        places = {layer: {key: torch.cat(parts) for key, parts in keys.items()} for layer, keys in self._places.items()}
        self._refresh(places)
        for name, make in self._derived.items():
            own = (p for p in self._layers[name]._parameters.values() if p is not None and p.numel())
            if not self._touched.isdisjoint(storage_of(parameter.data) for parameter in own):
                make()
        self._places, self._touched = {}, set()

    @torch.no_grad()
    def finish(self) -> None:
        """After the last change: load again what has to be, and settle."""
        if self._reload_due:
            self._reload_due = False
            kept = [(name, shadow) for name, shadow in self._shadows.items() if shadow is not None]
            self._reload(self._reloaded, kept)
            for layer in self._reloaded.values():
                parameters = (p for p in layer._parameters.values() if p is not None and p.numel())
                self._touched |= {storage_of(parameter.data) for parameter in parameters} - {0}
        self.settle()
