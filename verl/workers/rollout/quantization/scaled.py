"""What `ascend` and `fp8` have in common: a weight becomes values in e4m3 and scales, which travel as two tensors."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from verl.config import RolloutConfig
from verl.utils.tensor_diff import diff_and_update_
from verl.workers.rollout.quantization.base import QuantizationScheme
from verl.workers.weight_sync.encode_report import EncodeReport
from verl.workers.weight_sync.manifest import TensorSpec, WeightUpdateError

_VALUES = "float8_e4m3fn"


def _finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # A NaN comes out of aminmax as both; isfinite would write, and read again, a tensor as large as this one.
    return all(bool(torch.isfinite(bound)) for bound in torch.aminmax(tensor))


@dataclass(frozen=True)
class ScaledWeights:
    """One kind of quantized weight.

    Attributes:
        suffix: what a scale's name adds to its weight's.
        dtype: torch dtype name of the scales.
        scale_shape: shape of the scales of a weight, by the weight's shape.
    """

    suffix: str
    dtype: str
    scale_shape: Callable[[tuple[int, ...]], tuple[int, ...]]

    def weight_of(self, name: str) -> str | None:
        """The weight that a tensor holds the scales of; None for any other tensor."""
        return name.removesuffix(self.suffix) if name.endswith(f"weight{self.suffix}") else None

    def check_pair(self, name: str, specs: Mapping[str, TensorSpec]) -> None:
        """Refuse `name` if what it belongs to has come too and does not fit."""
        weight_name = self.weight_of(name)
        if weight_name is not None and specs[name].dtype != self.dtype:
            raise WeightUpdateError(f"parameter {name!r}: scales are {self.dtype}, it is {specs[name].dtype}")
        weight = specs.get(weight_name or name)
        scale = specs.get(f"{weight_name or name}{self.suffix}")
        if weight is None or scale is None:
            return
        if weight.dtype != _VALUES:
            raise WeightUpdateError(f"parameter {weight.name!r}: {weight.dtype} with scales; it should be {_VALUES}")
        expected = self.scale_shape(weight.shape)
        if scale.shape != expected:
            raise WeightUpdateError(
                f"parameter {scale.name!r}: scales of shape {list(scale.shape)}, a weight of shape "
                f"{list(weight.shape)} has {list(expected)}: were they left padded?"
            )

    def check_complete(self, specs: Mapping[str, TensorSpec]) -> None:
        """Refuse weights without their scales and scales without their weight."""
        for name, spec in specs.items():
            weight_name = self.weight_of(name)
            if spec.dtype == _VALUES and f"{name}{self.suffix}" not in specs:
                raise WeightUpdateError(f"parameter {name!r}: its scales ({name}{self.suffix}) did not arrive")
            if weight_name is not None and weight_name not in specs:
                raise WeightUpdateError(f"parameter {name!r}: its weight ({weight_name}) did not arrive")


class ScaledScheme(QuantizationScheme):
    """A scheme whose weights travel as `(name, float8_e4m3fn)` and `(name + suffix, scales)`."""

    scaled: ClassVar[ScaledWeights]

    def __init__(self, rollout: RolloutConfig, model_dir: str):
        super().__init__(rollout, model_dir)
        self._report = EncodeReport()

    @abstractmethod
    def quantizes(self, name: str) -> bool:
        """Whether a checkpoint tensor is quantized."""

    @abstractmethod
    def quantize(self, weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A weight, rounded to `dtype` first.

        Returns:
            values float8_e4m3fn of its shape; scales, in which NaN and Inf must show; [2] squared error of the two,
            and sum of squares of the rounded weight, on its device.
        """

    def requantize(
        self, weight: torch.Tensor, dtype: torch.dtype, values: torch.Tensor, scales: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Bring `values` and `scales` to those of `quantize`; the places that changed in each, and the same error."""
        fresh_values, fresh_scales, error = self.quantize(weight, dtype)
        return diff_and_update_(values, fresh_values), diff_and_update_(scales, fresh_scales), error

    @staticmethod
    @abstractmethod
    def finite_scales(scales: torch.Tensor) -> bool:
        """Whether the weight that these are the scales of was finite."""

    def encode_weight(
        self, name: str, weight: torch.Tensor, dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        """Suffix -> tensor: what a weight, or some of its rows, becomes. NaN and Inf are left to `check_sent`."""
        started = time.perf_counter()
        values, scales, error = self.quantize(weight, dtype or weight.dtype)
        self._report.add(name, error)
        self._report.seconds += time.perf_counter() - started
        return {"": values, self.scaled.suffix: scales}

    def diff_and_update_(
        self, name: str, weight: torch.Tensor, kept: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        started = time.perf_counter()
        suffix = self.scaled.suffix
        values_at, scales_at, error = self.requantize(weight, dtype or weight.dtype, kept[""], kept[suffix])
        self._report.add(name, error)
        self._report.seconds += time.perf_counter() - started
        return {"": values_at, suffix: scales_at}

    def encode(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in named_tensors:
            encoded = {name: tensor}
            if tensor.dtype != torch.float8_e4m3fn and self.scaled.weight_of(name) is None and self.quantizes(name):
                encoded = {name + suffix: part for suffix, part in self.encode_weight(name, tensor).items()}
            for part_name, part in encoded.items():
                self.check_sent(part_name, part)
            yield from encoded.items()

    def check_sent(self, name: str, values: torch.Tensor) -> None:
        weight_name = self.scaled.weight_of(name)
        if weight_name is None:
            # What e4m3 makes of NaN and Inf shows in its scales.
            finite = values.dtype == torch.float8_e4m3fn or _finite(values)
        else:
            finite = self.finite_scales(values)
        if not finite:
            raise WeightUpdateError(
                f"parameter {(weight_name or name)!r} holds NaN or Inf: the training diverged; nothing more was sent"
            )

    def pop_report(self) -> EncodeReport:
        report, self._report = self._report, EncodeReport()
        return report

    @classmethod
    def check_tensor(cls, name: str, tensor: torch.Tensor, arrived: Mapping[str, TensorSpec]) -> None:
        cls.scaled.check_pair(name, arrived)
        if cls.scaled.weight_of(name) is not None and not cls.finite_scales(tensor):
            raise WeightUpdateError(f"parameter {name!r} holds a NaN or infinite scale: its weight is not finite")

    @classmethod
    def check_complete(cls, arrived: Mapping[str, TensorSpec]) -> None:
        cls.scaled.check_complete(arrived)
