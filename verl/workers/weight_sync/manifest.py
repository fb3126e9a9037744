"""The tensors that a full update consists of, and the check that all of them were received."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from math import prod

import torch

from verl.workers.weight_sync.messages import FullManifest, ManifestMessage, TensorSpecMessage


class WeightUpdateError(RuntimeError):
    """A weight update was refused. The replica serves nothing until a full update succeeds."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype: `torch.bfloat16` -> `"bfloat16"`."""
    return str(dtype).removeprefix("torch.")


def dtype_from_name(name: str) -> torch.dtype:
    """Return the dtype of a name: `"bfloat16"` -> `torch.bfloat16`.

    Raises:
        WeightUpdateError: torch has no such dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise WeightUpdateError(f"dtype={name!r} in a weight bucket is not a torch dtype")
    return dtype


@dataclass(frozen=True)
class TensorSpec:
    """Checkpoint name, shape and dtype name of a tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> TensorSpec:
        return cls(name, tuple(tensor.shape), dtype_name(tensor.dtype))

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * dtype_from_name(self.dtype).itemsize

    def to_message(self) -> TensorSpecMessage:
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype}

    @classmethod
    def from_message(cls, message: TensorSpecMessage) -> TensorSpec:
        return cls(str(message["name"]), tuple(int(n) for n in message["shape"]), str(message["dtype"]))


@dataclass
class Manifest:
    """The tensors of a full update to `version`, and the number of buckets that carried them."""

    version: int
    num_buckets: int = 0
    specs: dict[str, TensorSpec] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    def add(self, spec: TensorSpec) -> None:
        """Record a tensor.

        Raises:
            WeightUpdateError: duplicate name.
        """
        if spec.name in self.specs:
            raise WeightUpdateError(f"duplicate name {spec.name!r} in the update to version {self.version}")
        self.specs[spec.name] = spec

    def to_message(self) -> FullManifest:
        return {
            "version": self.version,
            "num_buckets": self.num_buckets,
            "specs": [spec.to_message() for spec in self.specs.values()],
        }

    @classmethod
    def from_message(cls, message: ManifestMessage) -> Manifest:
        """Return the manifest that a message describes.

        Raises:
            WeightUpdateError: it is the manifest of a delta, or has a duplicate name.
        """
        if "specs" not in message:
            raise WeightUpdateError(
                f"received the manifest of a delta, expected that of a full update to version {message['version']}"
            )
        manifest = cls(int(message["version"]), int(message["num_buckets"]))
        for spec in message["specs"]:
            manifest.add(TensorSpec.from_message(spec))
        return manifest


def check_received(sent: Manifest, received: Manifest) -> None:
    """Compare the sender's manifest with the tensors that were received.

    Raises:
        WeightUpdateError: they differ; the message names the first parameter that does.
    """
    if sent.version != received.version:
        raise WeightUpdateError(
            f"the sender finished version {sent.version}, but the engine was loading version {received.version}"
        )
    missing = sent.specs.keys() - received.specs.keys()
    if sent.num_buckets != received.num_buckets:
        raise WeightUpdateError(
            f"version {sent.version}: received {received.num_buckets} of {sent.num_buckets} buckets"
            + _first(", first missing parameter", missing, sent.specs)
        )
    if missing:
        raise WeightUpdateError(
            f"version {sent.version}: {len(missing)} parameters are missing"
            + _first(", the first is", missing, sent.specs)
        )
    extra = received.specs.keys() - sent.specs.keys()
    if extra:
        raise WeightUpdateError(
            f"version {sent.version}: received {len(extra)} parameters that are not in the sender's manifest"
            + _first(", the first is", extra, received.specs)
        )
    for name, spec in sent.specs.items():
        got = received.specs[name]
        if got != spec:
            raise WeightUpdateError(
                f"parameter {name!r}: sent as {spec.dtype}{list(spec.shape)} ({spec.nbytes} bytes), "
                f"received as {got.dtype}{list(got.shape)} ({got.nbytes} bytes)"
            )


def check_used(version: int, unused: Collection[str]) -> None:
    """Check that the engine used every tensor of an update.

    Args:
        unused: names of tensors that no worker of an engine read.

    Raises:
        WeightUpdateError: there are some; the message names up to five.
    """
    if unused:
        names = ", ".join(sorted(unused)[:5]) + (", ..." if len(unused) > 5 else "")
        raise WeightUpdateError(
            f"version {version}: the engine has no place for {len(unused)} tensors that the trainer sent: {names}. "
            "vLLM's model lacks these parameters, so it would compute another function than the trainer's; use a "
            "checkpoint without them, or a release of vLLM whose model has them"
        )


def _first(words: str, names: Iterable[str], order: Iterable[str]) -> str:
    """Return `words` and the first of `names` in `order`; an empty string if there are no names."""
    names = set(names)
    first = next((name for name in order if name in names), None)
    return f"{words} {first!r}" if first is not None else ""
