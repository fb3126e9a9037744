"""Position of each checkpoint element in a running engine: recorded during a full load, used to apply deltas.

`LoadTrace` watches one load through the engine's own loaders, which may stack, cut or transpose, and records which box
of which checkpoint tensor was copied to which memory. Nothing is inferred from names or shapes:

- A copy directly into a parameter's memory is a region.
- A copy into a tensor that the engine then copies into a parameter is a region if the bytes arrive unchanged.
- Any other operation on a weight (packing for a kernel, conversion, quantization) makes its name opaque.
- A weight that no operation reads is unused: a loader skipped it.

    flattened checkpoint tensor --Region--> flattened parameter, checkpoint layout --Target--> memory, kernel layout
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

# A strided walk: (source stride, size, target stride) of each dimension, the largest source stride first.
Steps = tuple[tuple[int, int, int], ...]


def storage_of(tensor: torch.Tensor) -> int:
    """Return the address of a tensor's storage; 0 for a tensor that is made of others, such as torchao's."""
    return 0 if is_traceable_wrapper_subclass(tensor) else tensor.untyped_storage().data_ptr()


def _merge(steps: Iterable[tuple[int, int, int]]) -> Steps:
    """Sort steps by source stride, merge contiguous ones, and drop those of size 1."""
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
        name: `layer.parameter`, the engine's name.
        layer: name of its layer.
        kernel_tensor: the tensor that kernels read.
        steps: from the flattened parameter in the checkpoint layout to the storage of `kernel_tensor`; empty if both
            layouts are equal.
        buffer: the tensor that deltas are written to instead, if elements of `kernel_tensor` cannot be written. A
            refresh of the layer copies it to the kernel layout.
    """

    name: str
    layer: str
    kernel_tensor: torch.Tensor
    steps: Steps
    buffer: torch.Tensor | None = None

    @classmethod
    def same_layout(cls, name: str, layer: str, kernel_tensor: torch.Tensor) -> Target:
        """Return a parameter whose checkpoint layout is its kernel layout: its indices are storage offsets."""
        return cls(name, layer, kernel_tensor, ())

    @classmethod
    def kernel_layout(
        cls, name: str, layer: str, kernel_tensor: torch.Tensor, steps: Iterable[tuple[int, int, int]]
    ) -> Target:
        """Return a parameter with a separate kernel layout.

        Args:
            steps: (stride in the checkpoint layout, size, stride in `kernel_tensor`) of each dimension.

        Raises:
            ValueError: two dimensions have the same stride, so an index does not determine a position.
        """
        merged = _merge(steps)
        if len({source for source, _, _ in merged}) < len(merged):
            raise ValueError(f"{name}: two dimensions of the checkpoint layout have the same stride: {merged}")
        return cls(name, layer, kernel_tensor, merged)

    @classmethod
    def buffered(cls, name: str, layer: str, kernel_tensor: torch.Tensor, buffer: torch.Tensor) -> Target:
        """Return a parameter whose elements are changed in a contiguous buffer in the checkpoint layout."""
        return cls(name, layer, kernel_tensor, ((1, buffer.numel(), 1),), buffer)

    @property
    def _written(self) -> torch.Tensor:
        return self.kernel_tensor if self.buffer is None else self.buffer

    def memory(self) -> torch.Tensor:
        """Return the whole storage behind the tensor that deltas change, flat, as integers of the element size."""
        tensor = self._written
        return bits(torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage()))

    def offsets(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the offsets in `memory` of indices, int64 [n], in the flattened parameter in the checkpoint layout."""
        if not self.steps:
            return indices
        offsets, rest = None, indices
        for source, _, target in self.steps:
            if source == 1:
                position = rest
            else:
                position = torch.div(rest, source, rounding_mode="floor")
                rest = rest - position * source
            part = position * target if target != 1 else position
            offsets = part if offsets is None else offsets + part
        assert offsets is not None
        return offsets + int(self._written.storage_offset())


@dataclass(frozen=True)
class Region:
    """A box of a flattened checkpoint tensor, and its position in the flattened parameter in the checkpoint layout."""

    source_start: int
    target_start: int
    steps: Steps

    @classmethod
    def of(cls, source_start: int, target_start: int, steps: Iterable[tuple[int, int, int]]) -> Region:
        return cls(source_start, target_start, _merge(steps))

    @property
    def numel(self) -> int:
        count = 1
        for _, size, _ in self.steps:
            count *= size
        return count

    def locate(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Find which elements of the checkpoint tensor lie inside the box.

        Args:
            indices: int64 [n], ascending, in the flattened checkpoint tensor.

        Returns:
            Indices in the parameter, int64 [m], and positions of these elements in `indices`, int64 [m]; None instead
            of the positions if all elements lie inside.
        """
        rest = indices - self.source_start if self.source_start else indices
        located = torch.full_like(rest, self.target_start) if not self.steps else None
        inside = rest >= 0 if self.source_start else None
        for source, size, target in self.steps:
            if source == 1:
                position, rest = rest, torch.zeros_like(rest)
            else:
                position = torch.div(rest, source, rounding_mode="floor")
                rest = rest - position * source
            within = position < size
            inside = within if inside is None else inside & within
            part = position * target + (self.target_start if located is None else 0)
            located = part if located is None else located + part
        assert located is not None
        if not self.steps or self.steps[-1][0] != 1:
            inside = rest == 0 if inside is None else inside & (rest == 0)
        if inside is None or bool(inside.all()):
            return located, None
        return located[inside], inside.nonzero().squeeze(-1)


@dataclass
class LayoutMap:
    """The result of a `LoadTrace`.

    Attributes:
        regions: by checkpoint name, the parameters that contain a box of the tensor.
        opaque: names of tensors with a part that did not arrive unchanged in a parameter's memory.
        names: all names that were loaded. A name that is neither in `regions` nor in `opaque` was not seen to be used.
    """

    regions: dict[str, list[tuple[Target, Region]]] = field(default_factory=dict)
    opaque: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)

    def mapped_elements(self) -> dict[str, int]:
        """Return the number of elements with a known position, by the engine's name of the parameter."""
        counts: dict[str, int] = {}
        for found in self.regions.values():
            for target, region in found:
                counts[target.name] = counts.get(target.name, 0) + region.numel
        return counts


@dataclass(frozen=True)
class _Write:
    """A copy of a part of a checkpoint tensor into memory that does not belong to a parameter yet."""

    name: str
    source: torch.Tensor
    source_start: int
    written: torch.Tensor


class LoadTrace(TorchDispatchMode):
    """Context manager that records the destination of each weight while an engine loads it.

    Args:
        in_place: parameters that are loaded in place and have a separate kernel layout: the tensor that loaders write
            to, and the parameter; by the storage of that tensor.
        copied: the other parameters, into which the engine copies at the end; by their storage.
    """

    def __init__(self, in_place: Mapping[int, tuple[torch.Tensor, Target]], copied: Mapping[int, Target]):
        super().__init__()
        self.map = LayoutMap()
        # The tensors that were read: name -> the widest dtype that they were copied or converted to, None for neither.
        self.held: dict[str, torch.dtype | None] = {}
        self._in_place, self._copied = dict(in_place), dict(copied)
        self._starts: list[int] = []
        self._sources: list[tuple[int, str, torch.Tensor]] = []
        self._writes: dict[int, list[_Write]] = {}
        self._kept: dict[str, torch.Tensor] = {}
        # Results of operations on sources, and the names of these, by storage; the tensors keep the storages alive.
        self._results: dict[int, tuple[torch.Tensor, set[str]]] = {}

    def set_sources(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Set the tensors that are loaded next. Of the earlier ones only those copied by `keep` remain known."""
        new = [(name, tensor) for name, tensor in named_tensors if tensor.numel()]
        self.map.names.update(name for name, _ in new)
        known = [*self._kept.items(), *new]
        self._sources = sorted((tensor.data_ptr(), name, tensor) for name, tensor in known)
        self._starts = [start for start, _, _ in self._sources]

    def keep(self, value: torch.Tensor) -> torch.Tensor:
        """Return a copy of a part of a tensor whose memory is about to be reused; its name stays known."""
        origin = self._origin(value)
        if origin is None:
            return value.clone()
        name, full, start = origin
        if name not in self._kept:
            self._kept[name] = full.clone()
        return self._kept[name].as_strided(value.size(), value.stride(), start)

    def flush(self) -> None:
        """Finish a set of sources: mark writes as opaque if no parameter has received them.

        Their memory belongs neither to a parameter nor to a layer that waits for more weights.
        """
        for writes in self._writes.values():
            self.map.opaque.update(write.name for write in writes)
        self._writes, self._results = {}, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            self._record_held(self._names_in(args[1]), args[0].dtype)
            if not args[0].is_meta:
                self._record_copy(args[0], args[1])
        elif not func.is_view:
            self._record_operation(func, (*args, *(kwargs or {}).values()), result)
        return result

    def _record_operation(self, func: Any, arguments: Iterable[Any], result: Any) -> None:
        """Record an operation other than a copy or a view: mark its sources as opaque, and remember its result."""
        flat = itertools.chain.from_iterable(a if isinstance(a, list | tuple) else (a,) for a in arguments)
        names = set().union(*(self._names_in(value) for value in flat if isinstance(value, torch.Tensor)))
        if not names:
            return
        self.map.opaque |= names
        converts = func is torch.ops.aten._to_copy.default
        self._record_held(names, result.dtype if converts else None)
        if isinstance(result, torch.Tensor) and storage_of(result):
            self._results[storage_of(result)] = result, names

    def _record_held(self, names: Iterable[str], dtype: torch.dtype | None) -> None:
        for name in names:
            known = self.held.setdefault(name, dtype)
            if known is None:
                self.held[name] = dtype
            elif dtype is not None and known != dtype:
                self.held[name] = torch.promote_types(known, dtype)

    def _names_in(self, tensor: torch.Tensor) -> set[str]:
        """Return the sources that a tensor is a view of, or that it was computed from."""
        origin = self._origin(tensor)
        if origin is not None:
            return {origin[0]}
        return self._results.get(0 if tensor.is_meta else storage_of(tensor), (None, set[str]()))[1]

    def _origin(self, tensor: torch.Tensor) -> tuple[str, torch.Tensor, int] | None:
        """Return the checkpoint tensor that contains this view: name, full tensor, index of the first element."""
        if tensor.is_meta or not tensor.numel() or not storage_of(tensor):
            return None
        index = bisect.bisect_right(self._starts, tensor.data_ptr()) - 1
        if index < 0:
            return None
        start, name, full = self._sources[index]
        distance = tensor.data_ptr() - start
        if distance >= full.nbytes or storage_of(tensor) != storage_of(full):
            return None
        return name, full, distance // full.element_size()

    def _record_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        origin = self._origin(source)
        if origin is not None:
            name, full, start = origin
            if source.shape != target.shape or not source.dtype == target.dtype == full.dtype:
                self.map.opaque.add(name)
                return
            write = _Write(name, source, start, target)
            in_place = self._in_place.get(storage_of(target))
            if in_place is not None:
                self._accept(write, in_place[1], _checkpoint_position(target, in_place[0]))
            else:
                self._writes.setdefault(storage_of(target), []).append(write)
            return
        parameter = self._copied.get(storage_of(target))
        writes = self._writes.pop(storage_of(source), []) if parameter is not None else []
        for write in writes:
            assert parameter is not None
            if source.shape != target.shape or source.stride() != target.stride():
                self.map.opaque.add(write.name)
                continue
            start = int(target.storage_offset() + write.written.storage_offset() - source.storage_offset())
            memory = parameter.memory().view(target.dtype)
            fits = start >= 0 and start + _extent(write.written) <= memory.numel()
            if fits and _equal_bytes(
                memory.as_strided(write.written.size(), write.written.stride(), start), write.source
            ):
                self._accept(write, parameter, (start, write.written.stride()))
            else:
                self.map.opaque.add(write.name)

    def _accept(self, write: _Write, target: Target, position: tuple[int, tuple[int, ...]] | None) -> None:
        """Record a region at a position (start, strides) of the parameter; opaque if there is no valid one."""
        if position is None:
            self.map.opaque.add(write.name)
            return
        start, strides = position
        steps = zip(write.source.stride(), write.source.size(), strides, strict=True)
        region = Region.of(write.source_start, start, steps)
        if not _is_walk(region.steps):
            self.map.opaque.add(write.name)
            return
        known = self.map.regions.setdefault(write.name, [])
        if all((other.name, at) != (target.name, region) for other, at in known):
            known.append((target, region))


def _is_walk(steps: Steps) -> bool:
    """Return whether each index is visited once: every stride is at least the extent of the next smaller one."""
    leads = all(step[0] >= following[0] * following[1] for step, following in itertools.pairwise(steps))
    return leads and all(source > 0 for source, _, _ in steps)


def _extent(tensor: torch.Tensor) -> int:
    """Return the elements between the first and the last element of a strided tensor, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))


def _equal_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(bits(a.contiguous()), bits(b.contiguous().to(a.device)))


def _checkpoint_position(view: torch.Tensor, parameter: torch.Tensor) -> tuple[int, tuple[int, ...]] | None:
    """Return start and strides of a view in the flattened parameter; None if the view is not a box of it."""
    flat = torch.empty(parameter.size(), device="meta").stride()
    distance = int(view.storage_offset() - parameter.storage_offset())
    if parameter.stride() == flat:
        return distance, view.stride()
    flat_stride_of = {
        stride: flat_stride
        for stride, size, flat_stride in zip(parameter.stride(), parameter.size(), flat, strict=True)
        if size != 1
    }
    strides, start = [], 0
    for size, stride in zip(view.size(), view.stride(), strict=True):
        if size != 1 and stride not in flat_stride_of:
            return None
        strides.append(flat_stride_of.get(stride, 0))
    for stride in sorted(flat_stride_of, reverse=True):
        start += distance // stride * flat_stride_of[stride]
        distance %= stride
    return (start, tuple(strides)) if distance == 0 else None


def parameters_by_storage(layers: Mapping[str, nn.Module]) -> dict[int, Target]:
    """Return storage address -> parameters, for layers that are not transformed after loading."""
    found: dict[int, Target] = {}
    for layer_name, layer in layers.items():
        for key, parameter in layer._parameters.items():
            if parameter is not None and parameter.numel() and storage_of(parameter.data):
                target = Target.same_layout(f"{layer_name}.{key}", layer_name, parameter.data)
                found.setdefault(storage_of(parameter.data), target)
    return found
