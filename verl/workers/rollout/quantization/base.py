"""What a quantisation of the rollout consists of, in all the places that take part in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from verl.trainer.config import RolloutConfig
from verl.workers.rollout.weight_sync.manifest import TensorSpec


class QuantizationScheme(ABC):
    """Instances live where the config is: in the server (`engine_overrides`) and in the trainer (`encode`).

    What the engine's workers do needs no config: static methods, called on the class.

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
    def encode(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Checkpoint tensors as the engine takes them; a stream, so that no more than one is held at a time.

        Raises:
            ValueError: a weight that holds NaN or Inf, naming it.
        """

    @staticmethod
    def begin(model: nn.Module) -> Mapping[str, nn.Module]:
        """Bring the engine's layers into their load layout; returns those that are then written in place, by name."""
        return {}

    @staticmethod
    def finish(model: nn.Module) -> None:
        """Bring them into their run-time layout."""
        return

    @staticmethod
    def check_arriving(name: str, tensor: torch.Tensor, arrived: Mapping[str, TensorSpec]) -> None:
        """Refuse a tensor before it is loaded.

        Args:
            arrived: what has come so far, `name` included.

        Raises:
            WeightUpdateError: naming the parameter.
        """
        return

    @staticmethod
    def check_complete(arrived: Mapping[str, TensorSpec]) -> None:
        """Refuse an update that lacks something, once all of it has come; WeightUpdateError naming the parameter."""
        return
