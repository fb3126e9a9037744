"""Shared by `ascend` and `fp8`: a weight is encoded as values and scales, which are sent as two tensors."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from verl.utils.quantization.encode_report import EncodeReport
from verl.utils.quantization.schemes import WeightFormat
from verl.utils.quantization_scheme import QuantizationScheme, ReceivedTensor
from verl.utils.tensor_diff import diff_and_update_
from verl.workers.weight_sync.manifest import WeightUpdateError, dtype_name

_E4M3 = {"float8_e4m3fn": 1}


def _finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # aminmax returns NaN as both bounds; isfinite would write, and read again, a tensor as large as this one.
    return all(bool(torch.isfinite(bound)) for bound in torch.aminmax(tensor))


@dataclass(frozen=True)
class ScaledWeights:
    """The pair of tensors that a weight is sent as.

    Attributes:
        suffix: added to the name of a weight for the name of its scales.
        dtype: torch dtype name of the scales.
        scale_shape: maps the shape of a weight to the shape of its scales.
        values: torch dtype name of the values -> number of weights in an element, along the last dimension.
    """

    suffix: str
    dtype: str
    scale_shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    values: Mapping[str, int] = field(default_factory=lambda: _E4M3)

    def weight_of(self, name: str) -> str | None:
        """Return the name of the weight whose scales a tensor holds; None for any other tensor."""
        return name.removesuffix(self.suffix) if name.endswith(f"weight{self.suffix}") else None

    def check_pair(self, name: str, received: Mapping[str, ReceivedTensor]) -> None:
        """Check `name` against its scales, or against its weight, if that was received too."""
        weight_name = self.weight_of(name)
        if weight_name is not None and received[name].dtype != self.dtype:
            raise WeightUpdateError(f"parameter {name!r}: scale dtype is {received[name].dtype}, expected {self.dtype}")
        weight = received.get(weight_name or name)
        scale = received.get(f"{weight_name or name}{self.suffix}")
        if weight is None or scale is None:
            return
        if weight.dtype not in self.values:
            raise WeightUpdateError(
                f"parameter {weight.name!r}: dtype of a weight with scales is {weight.dtype}, expected "
                f"{' or '.join(self.values)}"
            )
        *rows, elements = weight.shape
        expected = self.scale_shape((*rows, elements * self.values[weight.dtype]))
        if scale.shape != expected:
            raise WeightUpdateError(
                f"parameter {scale.name!r}: scale shape is {list(scale.shape)}, expected {list(expected)} for a weight "
                f"{weight.dtype} of shape {list(weight.shape)}; check that the scales are not padded"
            )

    def check_complete(self, received: Mapping[str, ReceivedTensor]) -> None:
        """Check that no weight lacks its scales and no scales lack their weight."""
        for name, spec in received.items():
            weight_name = self.weight_of(name)
            encoded = spec.dtype in self.values and weight_name is None
            if encoded and f"{name}{self.suffix}" not in received:
                raise WeightUpdateError(f"parameter {name!r}: its scales ({name}{self.suffix}) did not arrive")
            if weight_name is not None and weight_name not in received:
                raise WeightUpdateError(f"parameter {name!r}: its weight ({weight_name}) did not arrive")


class ScaledScheme(QuantizationScheme, ABC):
    """A scheme whose weights are sent as `(name, values)` and `(name + suffix, scales)`."""

    scaled: ClassVar[ScaledWeights]

    def __init__(self, weight_format: WeightFormat):
        super().__init__(weight_format)
        self._report = EncodeReport()

    @abstractmethod
    def quantize(
        self, name: str, weight: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Round the weight of a checkpoint tensor to `dtype` and quantize it.

        Returns:
            values in a dtype of `scaled.values`, with the same leading shape; scales, which show NaN and Inf; [2] the
            squared error of values and scales, and the sum of squares of the rounded weight, on its device.
        """

    def requantize(
        self, name: str, weight: torch.Tensor, dtype: torch.dtype, values: torch.Tensor, scales: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Update `values` and `scales` to those of `quantize`.

        Returns:
            The indices that changed in each of the two, and the error as of `quantize`.
        """
        new_values, new_scales, error = self.quantize(name, weight, dtype)
        return diff_and_update_(values, new_values), diff_and_update_(scales, new_scales), error

    @staticmethod
    @abstractmethod
    def finite_scales(scales: torch.Tensor) -> bool:
        """Return whether the weight with these scales was finite."""

    def encode_weight(
        self, name: str, weight: torch.Tensor, dtype: torch.dtype | None = None, *, report_as: str | None = None
    ) -> dict[str, torch.Tensor]:
        # NaN and Inf are left to `check_sent`.
        started = time.perf_counter()
        values, scales, error = self.quantize(name, weight, dtype or weight.dtype)
        self._report.add(report_as or name, error)
        self._report.seconds += time.perf_counter() - started
        return {"": values, self.scaled.suffix: scales}

    def diff_and_update_(
        self,
        name: str,
        weight: torch.Tensor,
        kept: Mapping[str, torch.Tensor],
        dtype: torch.dtype | None = None,
        *,
        report_as: str | None = None,
    ) -> dict[str, torch.Tensor]:
        started = time.perf_counter()
        suffix = self.scaled.suffix
        exact = dtype or weight.dtype
        values_indices, scales_indices, error = self.requantize(name, weight, exact, kept[""], kept[suffix])
        self._report.add(report_as or name, error)
        self._report.seconds += time.perf_counter() - started
        return {"": values_indices, suffix: scales_indices}

    def encode(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in named_tensors:
            encoded = {name: tensor}
            if not self._is_encoded(tensor) and self.scaled.weight_of(name) is None and self.quantizes(name):
                encoded = {name + suffix: part for suffix, part in self.encode_weight(name, tensor).items()}
            for part_name, part in encoded.items():
                self.check_sent(part_name, part)
            yield from encoded.items()

    def check_sent(self, name: str, values: torch.Tensor) -> None:
        weight_name = self.scaled.weight_of(name)
        if weight_name is None:
            # NaN and Inf of an encoded weight show in its scales.
            finite = self._is_encoded(values) or _finite(values)
        else:
            finite = self.finite_scales(values)
        if not finite:
            raise WeightUpdateError(
                f"parameter {(weight_name or name)!r} holds NaN or Inf: the training diverged; sending stopped here"
            )

    def _is_encoded(self, values: torch.Tensor) -> bool:
        return dtype_name(values.dtype) in self.scaled.values

    def pop_report(self) -> EncodeReport:
        report, self._report = self._report, EncodeReport()
        return report

    def adopt_report(self, report: EncodeReport) -> None:
        self._report.update(report)

    @classmethod
    def check_tensor(cls, name: str, tensor: torch.Tensor, received: Mapping[str, ReceivedTensor]) -> None:
        cls.scaled.check_pair(name, received)
        if cls.scaled.weight_of(name) is not None and not cls.finite_scales(tensor):
            raise WeightUpdateError(f"parameter {name!r} holds a NaN or infinite scale: its weight is not finite")

    @classmethod
    def check_complete(cls, received: Mapping[str, ReceivedTensor]) -> None:
        cls.scaled.check_complete(received)
