"""What a quantization of the rollout consists of, in all the places that take part in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from verl.config import RolloutConfig
from verl.utils.vllm.layout_map import Target
from verl.workers.weight_sync.encode_report import EncodeReport
from verl.workers.weight_sync.manifest import TensorSpec


class QuantizationScheme(ABC):
    """Instances live where the config is; checks and layouts of a running engine need none: static and class methods.

    Args:
        rollout: the section `actor_rollout_ref.rollout`.
        model_dir: the checkpoint that trainer and engine start from.
    """

    def __init__(self, rollout: RolloutConfig, model_dir: str):
        self._rollout = rollout
        self._model_dir = model_dir

    @abstractmethod
    def engine_overrides(self, device: str) -> dict[str, Any]:
        """What vLLM has to be started with besides, as arguments of its `AsyncEngineArgs`.

        Args:
            device: `cpu`, `cuda` or `npu`.

        Raises:
            ValueError: a layer, or a setting, that cannot work, naming it.
        """

    @abstractmethod
    def summary(self) -> str:
        """How the engine holds the weights, in one line."""

    def update_bytes(self, itemsize: int) -> int | None:
        """Bytes that one update sends, where that is not every parameter in the engine's dtype of `itemsize` bytes."""
        return None

    # ---- encoding, in the trainer or in the engine's workers (`rollout.quantization_side`) ----

    def quantizes(self, name: str) -> bool:
        """Whether a checkpoint tensor is sent in another form than its own."""
        return False

    def encodes_rows(self, name: str) -> bool:
        """Whether a checkpoint tensor may be encoded some rows at a time: the rows' codes are the codes' rows."""
        return False

    def encode_weight(
        self, name: str, weight: torch.Tensor, dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        """What some rows of a weight, rounded to `dtype`, become, by suffix of the name; only where `encodes_rows`."""
        raise NotImplementedError(f"{type(self).__name__} encodes no single weights")

    def diff_and_update_(
        self, name: str, weight: torch.Tensor, kept: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        """Bring `kept`, which `encode_weight` returned for rows of this shape, to what it would return now.

        Returns:
            By suffix, the places that changed in the flattened tensor, int64 ascending.
        """
        raise NotImplementedError(f"{type(self).__name__} encodes no single weights")

    def encode(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Checkpoint tensors as the engine takes them; a stream, so that no more than one is held at a time.

        Tensors that are encoded already pass through, checked.

        Raises:
            WeightUpdateError: a weight that holds NaN or Inf, naming it.
        """
        yield from named_tensors

    def check_sent(self, name: str, values: torch.Tensor) -> None:
        """Refuse to send what `encode` would not send, once it is encoded; elements of a tensor are enough to tell.

        Raises:
            WeightUpdateError: they come from NaN or Inf, naming the weight.
        """
        return

    def pop_report(self) -> EncodeReport:
        """What was encoded since the last call."""
        return EncodeReport()

    # ---- in the engine's workers ----

    @staticmethod
    def begin(model: nn.Module) -> Mapping[str, nn.Module]:
        """Bring the engine's layers into their load layout; returns those that are then written in place, by name."""
        return {}

    @staticmethod
    def finish(model: nn.Module) -> None:
        """Bring them into their run-time layout."""
        return

    @staticmethod
    def targets(model: nn.Module) -> list[tuple[torch.Tensor, Target]]:
        """For each parameter that is loaded in place, in the load layout: what loaders write to, and what is run."""
        return []

    @staticmethod
    def begin_delta(model: nn.Module) -> None:
        """Before single elements are changed: the layers have to be as they run."""
        return

    @staticmethod
    def refresh(model: nn.Module, places: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Make anew what layers derive from weights of which single places were changed (by layer and parameter)."""
        return

    @classmethod
    def check_tensor(cls, name: str, tensor: torch.Tensor, arrived: Mapping[str, TensorSpec]) -> None:
        """Refuse a tensor before it is loaded.

        Args:
            arrived: what has come so far, `name` included.

        Raises:
            WeightUpdateError: naming the parameter.
        """
        return

    @classmethod
    def check_complete(cls, arrived: Mapping[str, TensorSpec]) -> None:
        """Refuse an update that lacks something, once all of it has come; WeightUpdateError naming the parameter."""
        return
