"""What a weight update consists of, and the check that all of it arrived.

A manifest travels as plain strings and numbers (no pickled objects), so it can cross any transport.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch


class WeightUpdateError(RuntimeError):
    """A weight update was refused, naming the parameter; the replica serves nothing until a whole one succeeds."""


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `"bfloat16"`."""
    return str(dtype).removeprefix("torch.")


def dtype_from_name(name: str) -> torch.dtype:
    """`"bfloat16"` -> `torch.bfloat16`; anything that is not a torch dtype raises `WeightUpdateError`."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise WeightUpdateError(f"dtype={name!r} in a weight bucket is not a torch dtype")
    return dtype


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of an update: its checkpoint name, shape and dtype name."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> TensorSpec:
        return cls(name, tuple(tensor.shape), dtype_name(tensor.dtype))

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * dtype_from_name(self.dtype).itemsize

    def to_message(self) -> dict[str, Any]:
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype}

    @classmethod
    def from_message(cls, plain: dict[str, Any]) -> TensorSpec:
        return cls(str(plain["name"]), tuple(int(n) for n in plain["shape"]), str(plain["dtype"]))


@dataclass
class Manifest:
    """Every tensor that an update of `version` consists of, and in how many buckets it was sent."""

    version: int
    num_buckets: int = 0
    specs: dict[str, TensorSpec] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    def add(self, spec: TensorSpec) -> None:
        """Record one tensor; a name that occurs twice is refused."""
        if spec.name in self.specs:
            raise WeightUpdateError(f"parameter {spec.name!r} occurs twice in the update to version {self.version}")
        self.specs[spec.name] = spec

    def to_message(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "num_buckets": self.num_buckets,
            "specs": [spec.to_message() for spec in self.specs.values()],
        }

    @classmethod
    def from_message(cls, plain: dict[str, Any]) -> Manifest:
        manifest = cls(int(plain["version"]), int(plain["num_buckets"]))
        for spec in plain["specs"]:
            manifest.add(TensorSpec.from_message(spec))
        return manifest


def check_received(sent: Manifest, arrived: Manifest) -> None:
    """Raise `WeightUpdateError` naming the first parameter in which what arrived differs from what was sent."""
    if sent.version != arrived.version:
        raise WeightUpdateError(f"the sender finished version {sent.version}, the engine was loading {arrived.version}")
    if sent.num_buckets != arrived.num_buckets:
        raise WeightUpdateError(
            f"version {sent.version}: {arrived.num_buckets} of {sent.num_buckets} buckets arrived"
            + _first(", first missing parameter", sent.specs.keys() - arrived.specs.keys(), sent.specs)
        )
    missing = sent.specs.keys() - arrived.specs.keys()
    if missing:
        raise WeightUpdateError(
            f"version {sent.version}: {len(missing)} parameters did not arrive"
            + _first(", the first is", missing, sent.specs)
        )
    extra = arrived.specs.keys() - sent.specs.keys()
    if extra:
        raise WeightUpdateError(
            f"version {sent.version}: {len(extra)} parameters arrived that the sender does not list"
            + _first(", the first is", extra, arrived.specs)
        )
    for name, spec in sent.specs.items():
        got = arrived.specs[name]
        if got != spec:
            raise WeightUpdateError(
                f"parameter {name!r}: sent as {spec.dtype}{list(spec.shape)} ({spec.nbytes} bytes), "
                f"arrived as {got.dtype}{list(got.shape)} ({got.nbytes} bytes)"
            )


def _first(words: str, names: Iterable[str], order: Iterable[str]) -> str:
    names = set(names)
    first = next((name for name in order if name in names), None)
    return f"{words} {first!r}" if first is not None else ""
