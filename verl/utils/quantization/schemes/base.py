"""The torch-free half of a quantization scheme: requirements, vLLM arguments and sizes."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Protocol

from verl.utils.devices import DEVICES
from verl.utils.dtypes import choose_dtype
from verl.utils.model_dir.index import CheckpointIndex, read_checkpoint_index
from verl.utils.quantization.ascend_description.validation import validate_experts
from verl.utils.quantization.ascend_layers import Layer
from verl.utils.quantization.formats import E4M3_ERROR

FIELD = "actor_rollout_ref.rollout.quantization"


class RolloutSettings(Protocol):
    """The keys of `actor_rollout_ref.rollout` that schemes read. `RolloutConfig` has all of them."""

    @property
    def quantization(self) -> str | None: ...
    @property
    def quantization_config_file(self) -> str | None: ...
    @property
    def quantization_scheme(self) -> str | None: ...
    @property
    def quantization_side(self) -> str: ...
    @property
    def quantization_self_test(self) -> bool | None: ...
    @property
    def tensor_model_parallel_size(self) -> int: ...
    @property
    def expert_parallel_size(self) -> int: ...
    @property
    def load_format(self) -> str: ...
    @property
    def dtype(self) -> str: ...


class WeightFormat(ABC):
    """How an engine holds the weights of one checkpoint under one value of `rollout.quantization`.

    Preflight, server and trainer all use it. It reads names and shapes only and can be imported without torch.

    Class attributes:
        name: the value of `rollout.quantization`.
        devices: devices whose engines support it; `alternative` is the value to use on the others.
        reads_checkpoint: it depends on the names and shapes of the checkpoint's tensors.
        takes_scheme: it reads `rollout.quantization_scheme`.
        trainer_encodes: with `quantization_side=sender` the trainer encodes weights before it sends them.
        supports_qat: the trainer can compute with the engine's numbers (`fsdp_config.qat`).
        has_self_test: engines can test their quantized layers at their start (`quantization_self_test`).

    Args:
        settings: the section `actor_rollout_ref.rollout`.
        model_dir: the checkpoint that trainer and engine start from.
        read_index: returns the names and shapes of its tensors; by default they are read from its files.
    """

    name: ClassVar[str | None]
    devices: ClassVar[tuple[str, ...]] = DEVICES
    alternative: ClassVar[str] = ""
    reads_checkpoint: ClassVar[bool] = False
    takes_scheme: ClassVar[bool] = False
    trainer_encodes: ClassVar[bool] = False
    supports_qat: ClassVar[bool] = False
    has_self_test: ClassVar[bool] = False

    def __init__(
        self, settings: RolloutSettings, model_dir: str | Path, read_index: Callable[[], CheckpointIndex] | None = None
    ):
        self.settings, self.model_dir = settings, model_dir
        self._read_index = read_index or functools.partial(read_checkpoint_index, model_dir)

    def validate_settings(self, device: str) -> None:
        """Check the keys of `rollout` and the device, without a look at the checkpoint.

        Args:
            device: `cpu`, `cuda` or `npu`.

        Raises:
            ValueError, NotImplementedError: a value that cannot work, and what to use.
        """
        if device not in self.devices:
            raise ValueError(
                f"{FIELD}={self.name}: runs on {' and '.join(self.devices)}, not on {device}; use {self.alternative} "
                "there"
            )
        if self.settings.quantization_self_test and not self.has_self_test:
            raise ValueError(
                f"{FIELD}_self_test=True: quantization={self.name or 'null'} has no self-test; use "
                "quantization=ascend, or remove the key"
            )
        scheme = self.settings.quantization_scheme
        if scheme is not None and not self.takes_scheme:
            raise ValueError(
                f"{FIELD}_scheme={scheme}: {FIELD}={self.name or 'null'} has no schemes; use quantization=ascend, or "
                "remove the key"
            )

    def runs_self_test(self, device: str) -> bool:
        """Return whether an engine tests its quantized layers at its start; `device` as of `validate`."""
        chosen = self.settings.quantization_self_test
        return self.has_self_test and (device == "npu" if chosen is None else chosen)

    def validate(self, device: str, *, installed: bool) -> None:
        """Check the settings and the layers of the checkpoint.

        Args:
            device: `cpu`, `cuda` or `npu`.
            installed: the engine starts on this machine, so check its libraries and its processor too.

        Raises:
            ValueError, NotImplementedError: a setting, layer or library that cannot work, and what to do.
        """
        self.validate_settings(device)
        self._validate_engine(device, installed)

    def _validate_engine(self, device: str, installed: bool) -> None:
        """Check layers and libraries; called after `validate_settings`."""
        return

    def engine_overrides(self, device: str) -> dict[str, Any]:
        """Return the arguments of vLLM's `AsyncEngineArgs` that this format adds, after all checks.

        Raises:
            ValueError, NotImplementedError: as `validate` on the machine of the engine.
        """
        self.validate(device, installed=True)
        return self._engine_arguments()

    @abstractmethod
    def _engine_arguments(self) -> dict[str, Any]: ...

    @abstractmethod
    def summary(self) -> str:
        """Describe in one line how the engine holds the weights."""

    @property
    def weight_error(self) -> float:
        """Relative root mean square error of a quantized weight; by default that of e4m3."""
        return E4M3_ERROR

    def engine_bytes(self, itemsize: int) -> int | None:
        """Bytes of all weights in the engine, with `itemsize` bytes per element of an unquantized weight.

        Returns:
            None if names and shapes do not determine it.
        """
        return None

    def update_bytes(self, itemsize: int) -> int | None:
        """Bytes of a full weight update; None if every parameter is sent in the engine's dtype."""
        return self.engine_bytes(itemsize) if self.settings.quantization_side == "sender" else None

    @classmethod
    def estimated_bytes(cls, parameters: int, itemsize: int, scheme: str | None = None) -> int:
        """Estimate the bytes of a model's weights in the engine from its size alone.

        The default is 1 byte per weight, plus 1 scale byte per 32.

        Args:
            scheme: `rollout.quantization_scheme`.
        """
        return parameters * 33 // 32

    @classmethod
    def host_bytes(cls, parameters: int, scheme: str | None) -> int:
        """Estimate the host memory that an engine on an accelerator keeps for weight updates; arguments as above."""
        return 0

    def quantizes(self, name: str) -> bool:
        """Return whether the trainer or the engine's workers encode a checkpoint tensor before it is loaded."""
        return False


class ScaledFormat(WeightFormat):
    """A format of values with scales, made from the projections of the decoder."""

    reads_checkpoint = True
    trainer_encodes = True

    @property
    @abstractmethod
    def layers(self) -> Iterable[Layer]:
        """Every weight of the checkpoint, the quantized ones marked."""

    def validate_settings(self, device: str) -> None:
        super().validate_settings(device)
        load_format = self.settings.load_format
        if load_format != "dummy":
            # The engine would read a checkpoint that has neither quantized values nor scales.
            raise ValueError(
                f"actor_rollout_ref.rollout.load_format={load_format}: with quantization={self.name} the engine's "
                "first weights come from the trainer; use dummy"
            )

    def _validate_engine(self, device: str, installed: bool) -> None:
        validate_experts(self.layers)

    def _validate_bfloat16(self, device: str) -> None:
        """Check that the engine computes in bfloat16, the only dtype that the kernels take."""
        dtype = self.settings.dtype
        chosen = choose_dtype(device, dtype)
        if chosen.name != "bfloat16":
            raise ValueError(
                f"actor_rollout_ref.rollout.dtype={dtype}: the engine would compute in {chosen.name} ({chosen.why}), "
                f"and quantization={self.name} on {device} needs bfloat16; set actor_rollout_ref.rollout.dtype=bfloat16"
            )
