"""Where each element of a checkpoint is in a running engine: recorded while weights are loaded, used to patch them.

`LoadTrace` watches one load through the engine's own loaders, whatever they stack, cut or transpose, and notes which
box of which checkpoint tensor was copied where. Nothing is inferred from names or shapes:

- a copy straight into a parameter's memory is a region;
- a copy into a tensor that the engine then copies into the parameter is one where the bytes came through unchanged;
- whatever else is done with a weight (packed for a kernel, converted, quantized) makes its name opaque.

    checkpoint tensor, flattened --Region--> the parameter as it is loaded, flattened --Target--> memory that is run on
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from verl.utils.tensor_diff import bits

# Steps of a walk: (stride it leaves, how many, stride it takes), the largest stride first.
Steps = tuple[tuple[int, int, int], ...]


def storage_of(tensor: torch.Tensor) -> int:
    """What tensors that share memory have in common; 0 for one that is made of others, such as torchao's."""
    return 0 if is_traceable_wrapper_subclass(tensor) else tensor.untyped_storage().data_ptr()


def _merged(steps: Iterable[tuple[int, int, int]]) -> Steps:
    """Steps in order, those that continue one another taken as one."""
    merged: list[tuple[int, int, int]] = []
    for source, size, target in sorted((step for step in steps if step[1] != 1), reverse=True):
        if merged and merged[-1][0] == source * size and merged[-1][2] == target * size:
            merged[-1] = (source, merged[-1][1] * size, target)
        else:
            merged.append((source, size, target))
    return tuple(merged)


@dataclass(frozen=True, eq=False)
class Target:
    """A parameter of the engine.

    Attributes:
        name: `layer.parameter`, as the engine calls it.
        layer: its layer's name.
        run: the tensor that the engine runs on.
        steps: from the flattened parameter as it is loaded to `run`'s storage.
    """

    name: str
    layer: str
    run: torch.Tensor
    steps: Steps

    @classmethod
    def plain(cls, name: str, layer: str, run: torch.Tensor) -> Target:
        """One that is loaded in the layout that it is run in: places are storage offsets."""
        return cls(name, layer, run, ())

    @classmethod
    def laid_out(cls, name: str, layer: str, run: torch.Tensor, steps: Iterable[tuple[int, int, int]]) -> Target:
        """One that has a layout of its own: `steps` as (stride as loaded, size, stride in `run`)."""
        return cls(name, layer, run, _merged(steps))

    def memory(self) -> torch.Tensor:
        """All of the storage behind `run`, flat, as integers of an element's size."""
        whole = torch.empty(0, dtype=self.run.dtype, device=self.run.device).set_(self.run.untyped_storage())
        return bits(whole)

    def offsets(self, places: torch.Tensor) -> torch.Tensor:
        """Offsets in `memory` of places in the flattened parameter as it is loaded."""
        if not self.steps:
            return places
        offsets, rest = None, places
        for source, _, target in self.steps:
            if source == 1:
                taken, rest = rest, None
            else:
                taken = torch.div(rest, source, rounding_mode="floor")
                rest = rest - taken * source
            part = taken * target if target != 1 else taken
            offsets = part if offsets is None else offsets + part
        assert offsets is not None
        return offsets + self.run.storage_offset()


@dataclass(frozen=True)
class Region:
    """A box of a flattened checkpoint tensor, and where it is in the flattened parameter as it is loaded."""

    source_start: int
    target_start: int
    steps: Steps

    @classmethod
    def of(cls, source_start: int, target_start: int, steps: Iterable[tuple[int, int, int]]) -> Region:
        return cls(source_start, target_start, _merged(steps))

    @property
    def numel(self) -> int:
        count = 1
        for _, size, _ in self.steps:
            count *= size
        return count

    def locate(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Which of ascending `places` of the checkpoint tensor lie inside, and where they go.

        Returns:
            Places in the parameter, and which of the given ones they are; None for all of them.
        """
        rest = places - self.source_start if self.source_start else places
        taken_at = torch.full_like(rest, self.target_start) if not self.steps else None
        inside = rest >= 0 if self.source_start else None
        for source, size, target in self.steps:
            if source == 1:
                taken, rest = rest, torch.zeros_like(rest)
            else:
                taken = torch.div(rest, source, rounding_mode="floor")
                rest = rest - taken * source
            within = taken < size
            inside = within if inside is None else inside & within
            part = taken * target + (self.target_start if taken_at is None else 0)
            taken_at = part if taken_at is None else taken_at + part
        assert taken_at is not None
        if not self.steps or self.steps[-1][0] != 1:
            inside = rest == 0 if inside is None else inside & (rest == 0)
        if inside is None or bool(inside.all()):
            return taken_at, None
        return taken_at[inside], inside.nonzero().squeeze(-1)


@dataclass
class LayoutMap:
    """What a `LoadTrace` found.

    Attributes:
        regions: by checkpoint name, every parameter that it is a part of.
        opaque: names with a part that did not arrive unchanged in a parameter's memory.
        names: all that were brought; of one that is neither of the above nothing was seen to be taken.
    """

    regions: dict[str, list[tuple[Target, Region]]] = field(default_factory=dict)
    opaque: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)

    def filled(self) -> dict[str, int]:
        """Elements that arrived in each parameter, by the engine's name."""
        counts: dict[str, int] = {}
        for found in self.regions.values():
            for target, region in found:
                counts[target.name] = counts.get(target.name, 0) + region.numel
        return counts


@dataclass(frozen=True)
class _Write:
    """A checkpoint tensor's part in memory that is no parameter's yet."""

    name: str
    source: torch.Tensor
    source_start: int
    written: torch.Tensor


class LoadTrace(TorchDispatchMode):
    """Sees where weights go while an engine loads them; a context manager.

    Args:
        loaded: parameters that are loaded in place, in a layout of their own: the tensor that loaders write to, and
            the parameter; by that tensor's storage.
        run: the other parameters, which the engine copies into at the end; by their storage.
    """

    def __init__(self, loaded: Mapping[int, tuple[torch.Tensor, Target]], run: Mapping[int, Target]):
        super().__init__()
        self.map = LayoutMap()
        self._loaded, self._run = dict(loaded), dict(run)
        self._starts: list[int] = []
        self._sources: list[tuple[int, str, torch.Tensor]] = []
        self._writes: dict[int, list[_Write]] = {}
        self._kept: dict[str, torch.Tensor] = {}

    def bring(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """The tensors that are loaded next; earlier ones that nothing holds are forgotten."""
        brought = [(name, tensor) for name, tensor in named_tensors if tensor.numel()]
        self.map.names.update(name for name, _ in brought)
        known = [*self._kept.items(), *brought]
        self._sources = sorted((tensor.data_ptr(), name, tensor) for name, tensor in known)
        self._starts = [start for start, _, _ in self._sources]

    def keep(self, value: torch.Tensor) -> torch.Tensor:
        """A copy of a part of a tensor whose memory is about to be used again; it is still known by its name."""
        origin = self._origin(value)
        if origin is None:
            return value.clone()
        name, whole, start = origin
        if name not in self._kept:
            self._kept[name] = whole.clone()
        return self._kept[name].as_strided(value.size(), value.stride(), start)

    def settle(self) -> None:
        """After loading some tensors: what is in neither a parameter nor a waiting layer never arrives in one."""
        for writes in self._writes.values():
            self.map.opaque.update(write.name for write in writes)
        self._writes = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            if not args[0].is_meta:
                self._copied(args[0], args[1])
        elif not func.is_view:
            for value in (*args, *(kwargs or {}).values()):
                origin = self._origin(value) if isinstance(value, torch.Tensor) else None
                if origin is not None:
                    self.map.opaque.add(origin[0])
        return result

    def _origin(self, tensor: torch.Tensor) -> tuple[str, torch.Tensor, int] | None:
        """Name and whole of the checkpoint tensor that this is a view of, and its first element's place in it."""
        if tensor.is_meta or not tensor.numel() or not storage_of(tensor):
            return None
        index = bisect.bisect_right(self._starts, tensor.data_ptr()) - 1
        if index < 0:
            return None
        start, name, whole = self._sources[index]
        distance = tensor.data_ptr() - start
        if distance >= whole.nbytes or storage_of(tensor) != storage_of(whole):
            return None
        return name, whole, distance // whole.element_size()

    def _copied(self, target: torch.Tensor, source: torch.Tensor) -> None:
        origin = self._origin(source)
        if origin is not None:
            name, whole, start = origin
            if source.shape != target.shape or not source.dtype == target.dtype == whole.dtype:
                self.map.opaque.add(name)
                return
            write = _Write(name, source, start, target)
            in_place = self._loaded.get(storage_of(target))
            if in_place is not None:
                self._accept(write, in_place[1], _as_loaded(target, in_place[0]))
            else:
                self._writes.setdefault(storage_of(target), []).append(write)
            return
        parameter = self._run.get(storage_of(target))
        writes = self._writes.pop(storage_of(source), []) if parameter is not None else []
        for write in writes:
            assert parameter is not None
            if source.shape != target.shape or source.stride() != target.stride():
                self.map.opaque.add(write.name)
                continue
            start = target.storage_offset() + write.written.storage_offset() - source.storage_offset()
            memory = parameter.memory().view(target.dtype)
            fits = start >= 0 and start + _extent(write.written) <= memory.numel()
            if fits and _same_bytes(
                memory.as_strided(write.written.size(), write.written.stride(), start), write.source
            ):
                self._accept(write, parameter, (start, write.written.stride()))
            else:
                self.map.opaque.add(write.name)

    def _accept(self, write: _Write, target: Target, place: tuple[int, tuple[int, ...]] | None) -> None:
        if place is None:
            self.map.opaque.add(write.name)
            return
        start, strides = place
        steps = zip(write.source.stride(), write.source.size(), strides, strict=True)
        region = Region.of(write.source_start, start, steps)
        if not _is_walk(region.steps):
            self.map.opaque.add(write.name)
            return
        known = self.map.regions.setdefault(write.name, [])
        if all((other.name, at) != (target.name, region) for other, at in known):
            known.append((target, region))


def _is_walk(steps: Steps) -> bool:
    """Whether each place is met once: every stride leads past all that the smaller ones reach."""
    leads = all(step[0] >= following[0] * following[1] for step, following in itertools.pairwise(steps))
    return leads and all(source > 0 for source, _, _ in steps)


def _extent(tensor: torch.Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(bits(a.contiguous()), bits(b.contiguous().to(a.device)))


def _as_loaded(view: torch.Tensor, parameter: torch.Tensor) -> tuple[int, tuple[int, ...]] | None:
    """Place and strides of a view of a parameter in the flattened parameter; None where it is no box of it."""
    flat = torch.empty(parameter.size(), device="meta").stride()
    distance = view.storage_offset() - parameter.storage_offset()
    if parameter.stride() == flat:
        return distance, view.stride()
    logical = {
        stride: place
        for stride, size, place in zip(parameter.stride(), parameter.size(), flat, strict=True)
        if size != 1
    }
    strides, start = [], 0
    for size, stride in zip(view.size(), view.stride(), strict=True):
        if size != 1 and stride not in logical:
            return None
        strides.append(logical.get(stride, 0))
    for stride in sorted(logical, reverse=True):
        start += distance // stride * logical[stride]
        distance %= stride
    return (start, tuple(strides)) if distance == 0 else None


def parameters_by_storage(layers: Mapping[str, nn.Module]) -> dict[int, Target]:
    """The parameters of some layers that are run in the layout that they are loaded in, by their storage."""
    found: dict[int, Target] = {}
    for layer_name, layer in layers.items():
        for key, parameter in layer._parameters.items():
            if parameter is not None and parameter.numel() and storage_of(parameter.data):
                target = Target.plain(f"{layer_name}.{key}", layer_name, parameter.data)
                found.setdefault(storage_of(parameter.data), target)
    return found
