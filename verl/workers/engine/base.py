"""The interface of a training engine, independent of how the engine shards the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypedDict

import torch

from verl.protocol import DataProto
from verl.utils.quantization.encode_report import Errors
from verl.utils.quantization_scheme import QuantizationScheme
from verl.workers.engine.export import ExportUnit, gather_all
from verl.workers.engine.metric_sums import MeanShare
from verl.workers.engine.micro_batch import MicroBatching
from verl.workers.engine.qat import QatOptions


class LossFn(Protocol):
    """The policy's loss of one micro-batch of b samples, with responses padded to T.

    The engine sums the loss and the metrics over micro-batches and ranks. Divide them by the denominators of the
    mini-batch, not of the micro-batch. Micro-batches may have different metrics.
    """

    def __call__(
        self, log_probs: torch.Tensor, entropy: torch.Tensor, columns: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor | MeanShare]]:
        """Return the loss and the metrics, all scalar tensors or shares of a mean.

        The loss must depend on `log_probs` even if it is 0: the backward pass is collective.

        Args:
            log_probs, entropy: [b, T] float32, 0 where response_mask is 0.
            columns: the [b, T] and [b] columns of the batch.
        """
        ...


class ValueLossFn(Protocol):
    """The critic's loss of one micro-batch; summed as described in `LossFn`."""

    def __call__(
        self, values: torch.Tensor, columns: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss and the metrics, all scalar tensors.

        Args:
            values: [b, T] float32, 0 where response_mask is 0.
            columns: the [b, T] and [b] columns of the batch.
        """
        ...


class OptimizerStep(TypedDict):
    """Result of an optimizer step: the norm of the gradient before clipping, and the learning rate."""

    grad_norm: float
    lr: float


class LogProbs(NamedTuple):
    """Log-probabilities of the responses, and statistics of the distribution pi at each position.

    All are [B, T] float32 on the CPU, 0 where response_mask is 0. A statistic is None unless it was requested.

    Attributes:
        log_probs: log-probability of each response token.
        entropy: entropy of pi, over the whole vocabulary even with sampling masks.
        sum_pi_squared: sum of pi(v)^2 over the vocabulary, or over the tokens of the sampling mask.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor | None
    sum_pi_squared: torch.Tensor | None


class TrainEngine(ABC):
    """A model distributed over the ranks of a process group.

    Every method is collective: all ranks call the same methods in the same order.
    """

    @abstractmethod
    def optimizer_step(self) -> OptimizerStep:
        """Clip the gradient, update the weights, and clear the gradient.

        Raises:
            NonFiniteError: the gradient is NaN or infinite. It is raised on all ranks, before any weight changes.
        """

    @abstractmethod
    def schedule_step(self) -> None:
        """Advance the learning-rate schedule by one training step."""

    @abstractmethod
    def export_units(
        self,
        *,
        dtype: torch.dtype | None = None,
        exceptions: Mapping[str, torch.dtype] | None = None,
        encoder: QuantizationScheme | None = None,
    ) -> Iterator[ExportUnit]:
        """Iterate over all weights in the form in which this rank holds them, before they are gathered.

        A tied weight occurs once. All ranks must exhaust the iterator. The units use the model's memory until they are
        gathered; call `release` after that.

        Args:
            dtype: dtype to cast to; None keeps the dtype of the master weights.
            exceptions: other dtypes of single tensors, by checkpoint name.
            encoder: encodes rows before they are gathered, see `verl.workers.engine.export`.
        """

    def export_weights(
        self, *, dtype: torch.dtype | None = None, encoder: QuantizationScheme | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Iterate over the gathered weights under their checkpoint names and shapes; see `export_units`."""
        return gather_all(self.export_units(dtype=dtype, encoder=encoder))

    @abstractmethod
    def release(self) -> None:
        """Free the device memory of weights that `fsdp_config.param_offload` keeps on the host. Not collective.

        The other methods do it themselves; an export has to be followed by it, once its tensors are not used any more.
        """

    @abstractmethod
    def save(self, path: str | Path, contents: Sequence[str] = ("model", "optimizer", "extra")) -> None:
        """Write the parts `contents` of a resumable state into directory `path`."""

    @abstractmethod
    def load(self, path: str | Path, contents: Sequence[str] = ("model", "optimizer", "extra")) -> None:
        """Read the state that `save` wrote with any number of ranks."""

    @abstractmethod
    def export_hf(self, path: str | Path, dtype: str = "auto") -> None:
        """Write a Hugging Face directory that differs from `model.path` only in the weights.

        Args:
            dtype: value of `checkpoint.hf_dtype`.
        """


class PolicyEngine(TrainEngine):
    """A model that returns a distribution over the next token."""

    @abstractmethod
    def forward_backward(
        self, mini_batch: DataProto, loss_fn: LossFn, micro_batching: MicroBatching, *, entropy_grad: bool = False
    ) -> dict[str, float]:
        """Accumulate the gradient of `loss_fn` over this rank's share of a mini-batch.

        Args:
            mini_batch: columns input_ids, attention_mask [B, P+T], responses, response_mask [B, T] and those that
                `loss_fn` reads; meta_info `temperature`; optionally `sampling_masks`, which restrict log-probabilities
                to the tokens that the sampler kept. Ranks may hold different numbers of samples, including 0.
            micro_batching: size of the micro-batches.
            entropy_grad: True if the loss differentiates the entropy.

        Returns:
            the metrics, `loss` and `padding_fraction`, reduced over micro-batches and ranks, equal on all ranks.

        Raises:
            NonFiniteError: the loss is NaN or infinite on any rank. It is raised on all ranks, and the gradients are
                dropped.
        """

    @abstractmethod
    def log_probs(
        self,
        data: DataProto,
        micro_batching: MicroBatching,
        *,
        calculate_entropy: bool,
        calculate_sum_pi_squared: bool = False,
        updating: bool = False,
    ) -> LogProbs:
        """Return log-probabilities of the responses and the requested statistics, in the order of `data`.

        Args:
            data: columns and meta_info as in `forward_backward`.
            updating: run the model as `forward_backward` does, with gradients and checkpointing.
        """

    @abstractmethod
    def output_errors(self, data: DataProto, micro_batching: MicroBatching, options: QatOptions) -> Errors:
        """Return the errors that the engine's quantization causes in the output of each layer; see `OutputErrors`.

        Args:
            data: columns and meta_info as in `forward_backward`; the result is that of this rank's samples.
            options: the numbers of the engine, whether or not this model computes with them.
        """


class ValueEngine(TrainEngine):
    """A model that returns one number per position: the expected return from that position."""

    @abstractmethod
    def forward_backward(
        self, mini_batch: DataProto, loss_fn: ValueLossFn, micro_batching: MicroBatching
    ) -> dict[str, float]:
        """Accumulate the gradient as `PolicyEngine.forward_backward`; no temperature is needed."""

    @abstractmethod
    def values(self, data: DataProto, micro_batching: MicroBatching) -> torch.Tensor:
        """Return the values [B, T] float32 on the CPU, in the order of `data`.

        They are taken at the positions that predict the response tokens, and are 0 where response_mask is 0.

        Args:
            data: columns input_ids, attention_mask [B, P+T], responses, response_mask [B, T].
        """
