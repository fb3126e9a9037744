"""What the trainer needs from an engine, whatever shards the model underneath."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from verl.protocol import DataProto
from verl.utils.quantization_scheme import QuantizationScheme
from verl.workers.engine.export import ExportUnit, gather_all
from verl.workers.engine.micro_batch import MicroBatching


class LossFn(Protocol):
    """The policy's loss of one micro-batch of b samples, responses padded to T.

    Loss and metrics are added up over micro-batches and ranks: divide by the mini-batch's denominators, not by the
    micro-batch's.
    """

    def __call__(
        self, log_probs: torch.Tensor, entropy: torch.Tensor, columns: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and metrics, from float32 [b, T] that are 0 where response_mask is 0, and the batch's [b, T] columns."""
        ...


class ValueLossFn(Protocol):
    """The critic's loss of one micro-batch; what `LossFn` says about sums holds for it too."""

    def __call__(
        self, values: torch.Tensor, columns: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and metrics, from float32 [b, T] that are 0 where response_mask is 0, and the batch's [b, T] columns."""
        ...


class TrainEngine(ABC):
    """A model spread over the ranks of a process group. Every method is collective: all ranks call it, in one order."""

    @abstractmethod
    def optimizer_step(self) -> dict[str, float]:
        """Clip the gradient, step, and clear it. Returns `grad_norm` (before clipping) and `lr`.

        Raises:
            NonFiniteError: the gradient is NaN or infinite; raised on all ranks, no weight changed.
        """

    @abstractmethod
    def schedule_step(self) -> None:
        """Advance the learning-rate schedule by one training step."""

    @abstractmethod
    def export_units(
        self, *, dtype: torch.dtype | None = None, encoder: QuantizationScheme | None = None
    ) -> Iterator[ExportUnit]:
        """Every weight, a tied one once, as this rank holds it and before it is gathered.

        All ranks must exhaust it.

        Args:
            dtype: to cast to; None for that of the master weights.
            encoder: encodes rows before they are gathered, see `verl.workers.engine.export`.
        """

    def export_weights(
        self, *, dtype: torch.dtype | None = None, encoder: QuantizationScheme | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight under its checkpoint name and shape, whole, one after the other; otherwise as `export_units`."""
        return gather_all(self.export_units(dtype=dtype, encoder=encoder))

    @abstractmethod
    def save(self, path: str | Path, contents: Sequence[str] = ("model", "optimizer", "extra")) -> None:
        """Write a resumable state into directory `path`; `hf_model` among the contents adds `path/huggingface`."""

    @abstractmethod
    def load(self, path: str | Path, contents: Sequence[str] = ("model", "optimizer", "extra")) -> None:
        """Read what `save` wrote, with any number of ranks; `hf_model` is not read again."""

    @abstractmethod
    def export_hf(self, path: str | Path) -> None:
        """Write a Hugging Face model directory: config, generation config, tokenizer, safetensors."""


class PolicyEngine(TrainEngine):
    """A model whose output is a distribution over the next token."""

    @abstractmethod
    def forward_backward(
        self, mini_batch: DataProto, loss_fn: LossFn, micro_batching: MicroBatching, *, entropy_grad: bool = False
    ) -> dict[str, float]:
        """Accumulate the gradient of `loss_fn` over this rank's share of a mini-batch.

        Args:
            mini_batch: columns input_ids, attention_mask [B, P+T], responses, response_mask [B, T] and what `loss_fn`
                reads; meta_info `temperature`. Ranks may hold different numbers of samples, none included.
            entropy_grad: whether the loss differentiates the entropy.

        Returns:
            the metrics and `loss`, summed over micro-batches and ranks, equal on all ranks.

        Raises:
            NonFiniteError: the loss is NaN or infinite, on any rank; raised on all, gradients dropped.
        """

    @abstractmethod
    def log_probs(
        self,
        data: DataProto,
        micro_batching: MicroBatching,
        *,
        calculate_entropy: bool,
        calculate_sum_pi_squared: bool = False,
    ) -> tuple[Any, ...]:
        """Log-probabilities of the responses and what is asked for of each position's distribution pi.

        All are [B, T] float32 on the CPU, 0 where response_mask is 0, in the order of `data`; columns and meta_info as
        in `forward_backward`.

        Returns:
            log-probabilities, entropies (None unless asked for) and, as a third, only where asked for, the sums of
            pi(v)^2 over the vocabulary.
        """


class ValueEngine(TrainEngine):
    """A model whose output is a number at each position: what the policy will still get from there on."""

    @abstractmethod
    def forward_backward(
        self, mini_batch: DataProto, loss_fn: ValueLossFn, micro_batching: MicroBatching
    ) -> dict[str, float]:
        """As `PolicyEngine.forward_backward`; there is no temperature."""

    @abstractmethod
    def values(self, data: DataProto, micro_batching: MicroBatching) -> torch.Tensor:
        """Values [B, T] float32 on the CPU at the positions that predict the response tokens, 0 where response_mask is
        0, in the order of `data`: columns input_ids, attention_mask [B, P+T], responses, response_mask [B, T]."""
