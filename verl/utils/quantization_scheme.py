"""The tensor half of a quantization scheme, as trainer, weight update and engine use it.

This module only declares the interface, below all packages that call it. The schemes are in
verl.workers.rollout.quantization; their torch-free half is in verl.utils.quantization.schemes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from verl.utils.quantization.encode_report import EncodeReport
from verl.utils.quantization.schemes import WeightFormat
from verl.utils.vllm.layout_map import Target


class ReceivedTensor(Protocol):
    """Name, shape and dtype name of a tensor of an update. `weight_sync.manifest.TensorSpec` is one."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...


class QuantizationScheme:
    """Encodes weights for an engine, checks them on arrival, and prepares the engine's layers for loading.

    Every method has the default of a scheme whose weights are sent and loaded as they are. The methods that a running
    engine calls on its layers need no instance: they are static or class methods.

    Args:
        weight_format: the torch-free half of the scheme.
    """

    def __init__(self, weight_format: WeightFormat):
        self.format = weight_format

    # ---- encoding, in the trainer or in the engine's workers (`rollout.quantization_side`) ----

    def quantizes(self, name: str) -> bool:
        """Return whether a checkpoint tensor is encoded before it is loaded."""
        return self.format.quantizes(name)

    def encodes_rows(self, name: str) -> bool:
        """Return whether encoding a checkpoint tensor commutes with row slicing."""
        return False

    def encode_weight(
        self, name: str, weight: torch.Tensor, dtype: torch.dtype | None = None, *, report_as: str | None = None
    ) -> dict[str, torch.Tensor]:
        """Encode a weight, or some of its rows if `encodes_rows`.

        Args:
            name: checkpoint name; of several tensors in one parameter, which all have the same scheme, any of them.
            weight: [..., K]; rounded to `dtype` first, None for its own.
            report_as: name in the report; None for `name`.

        Returns:
            Suffix of the tensor name -> tensor with the same leading shape.
        """
        raise NotImplementedError(f"{type(self).__name__} encodes no single weights")

    def diff_and_update_(
        self,
        name: str,
        weight: torch.Tensor,
        kept: Mapping[str, torch.Tensor],
        dtype: torch.dtype | None = None,
        *,
        report_as: str | None = None,
    ) -> dict[str, torch.Tensor]:
        """Update `kept`, an earlier result of `encode_weight`, to the result for `weight`.

        Returns:
            Suffix of the tensor name -> indices of the changed elements in the flattened tensor, int64, ascending.
        """
        raise NotImplementedError(f"{type(self).__name__} encodes no single weights")

    def encode(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Encode a stream of checkpoint tensors, holding only one of them at a time.

        Tensors that are already encoded are checked and passed through.

        Raises:
            WeightUpdateError: a weight that holds NaN or Inf; the message names it.
        """
        yield from named_tensors

    def check_sent(self, name: str, values: torch.Tensor) -> None:
        """Check an encoded tensor, or some of its elements, as `encode` does before it yields one.

        Raises:
            WeightUpdateError: the weight held NaN or Inf; the message names it.
        """
        return

    def pop_report(self) -> EncodeReport:
        """Return the report of the encoding since the last call."""
        return EncodeReport()

    def adopt_report(self, report: EncodeReport) -> None:
        """Add the report of weights that were encoded before, and are sent now."""
        return

    # ---- quantization-aware training ----

    def quantized_names(self) -> Iterable[str]:
        """Return the checkpoint names of the weights that the engine holds quantized."""
        return ()

    def decode_weight(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers that the engine multiplies with.

        Args:
            parts: a result of `encode_weight`, or whole rows of it.
        """
        raise NotImplementedError(f"{type(self).__name__} decodes no weights")

    def round_activations(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [..., K] as the engine's kernels see the input of a quantized layer, in the dtype of x."""
        raise NotImplementedError(f"{type(self).__name__} rounds no activations")

    def saturated(self, x: torch.Tensor, parts: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Return, as a mask, the elements of x [..., K] beyond the largest number of their block.

        Args:
            parts: `encode_weight` of x; None for the input of a layer.
        """
        raise NotImplementedError(f"{type(self).__name__} does not tell which numbers saturate")

    # ---- in the engine's workers ----

    @staticmethod
    def check_engine(model: nn.Module) -> None:
        """Check that weights can be replaced in the layouts of the engine's layers.

        Raises:
            RuntimeError: a layer with an unknown layout or memory format; the message names it.
        """
        return

    @staticmethod
    def self_test(model: nn.Module, vllm_config: Any) -> None:
        """Load known weights into the engine's quantized layers, check them there, and put the old ones back.

        Args:
            vllm_config: the engine's `VllmConfig`.

        Raises:
            RuntimeError: what differed; the message names layer and release.
        """
        return

    @staticmethod
    def begin(model: nn.Module) -> Mapping[str, nn.Module]:
        """Bring the engine's layers into their checkpoint layout.

        Returns:
            By name, the layers whose parameters are then written in place.
        """
        return {}

    @staticmethod
    def finish(model: nn.Module) -> None:
        """Bring the engine's layers into their kernel layout."""
        return

    @staticmethod
    def targets(model: nn.Module) -> list[tuple[torch.Tensor, Target]]:
        """Return, for each parameter written in place, the tensor that loaders write to and the one that kernels read.

        Call it in the checkpoint layout only.
        """
        return []

    @staticmethod
    def begin_delta(model: nn.Module) -> None:
        """Restore the kernel layout before single elements are changed in it."""
        return

    @staticmethod
    def refresh(model: nn.Module, indices: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Recompute the values that layers derive from weights of which single elements were changed.

        Args:
            indices: layer name -> parameter name -> changed elements of the flattened parameter, int64.
        """
        return

    @classmethod
    def check_tensor(cls, name: str, tensor: torch.Tensor, received: Mapping[str, ReceivedTensor]) -> None:
        """Check a tensor before it is loaded.

        Args:
            received: all tensors received so far, `name` included.

        Raises:
            WeightUpdateError: a tensor that does not fit; the message names it.
        """
        return

    @classmethod
    def check_complete(cls, received: Mapping[str, ReceivedTensor]) -> None:
        """Check a complete update; WeightUpdateError for a missing tensor, naming it."""
        return
