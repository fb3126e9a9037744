"""The policy's output head: log-probabilities of the response tokens, with or without their logits in memory.

Both ways call the model's own `forward`. In the chunked way the head only notes its input, and returns a few known
numbers, the probe. So the model's operations on the logits (soft-capping, scaling) act on the probe, and are read from
the result. If they have another form, the model gets the plain head.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from verl.workers.engine.attention_choice import small_model
from verl.workers.engine.head_log_probs import HeadTerm, head_log_probs
from verl.workers.engine.log_probs import token_log_probs
from verl.workers.engine.logits_function import LogitsFunction, fit, probe
from verl.workers.engine.lora import adapter_of
from verl.workers.engine.micro_batch import MicroBatch, call_model

logger = logging.getLogger(__name__)

KEY = "actor_rollout_ref.model.use_fused_kernels"
_OTHER_LOGITS = "it changes the logits of its output head by other operations than scaling and soft-capping"


class _Request(NamedTuple):
    """What a forward pass of the model computes."""

    micro_batch: MicroBatch
    temperature: float
    options: dict[str, bool]


class OutputHead:
    """Computes log-probabilities with a model, whose output head and `forward` it replaces.

    `forward` is set on the instance, inside FSDP's hooks: they see the log-probabilities as the model's output, and
    the head's weight is gathered.

    Attributes:
        chunked: True if logits are computed in tiles and dropped.

    Args:
        model: loaded and sharded, and with quantization-aware training, quantized.
        requested: value of `model.use_fused_kernels`; None for the chunked head if the model permits it.

    Raises:
        ValueError: the chunked head is requested, and the model's head is not a plain linear layer.
    """

    def __init__(self, model: PreTrainedModel, requested: bool | None):
        self._model, self._requested = model, requested
        self._head: Any = model.get_output_embeddings()
        self._request: _Request | None = None
        self._function: LogitsFunction | None = None
        self.chunked = requested is not False
        reason = why_not_linear(self._head)
        if self.chunked and reason is not None:
            self._use_plain_head(reason)
        self._head.register_forward_pre_hook(self._select_rows)
        model.forward = functools.partial(self._forward, model.forward)

    def log_probs(
        self, micro_batch: MicroBatch, temperature: float, *, entropy_grad: bool = False, sum_pi_squared: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the result of `token_log_probs` for the response tokens of a micro-batch.

        Raises:
            ValueError: the chunked head is requested, and the model has operations on its logits that it cannot do.
            NotImplementedError: the head cannot be restricted to the response.
        """
        options = {"entropy_grad": entropy_grad, "sum_pi_squared": sum_pi_squared}
        self._request = _Request(micro_batch, temperature, options)
        try:
            return call_model(self._model, micro_batch, attention_mask=None, use_cache=False)
        finally:
            self._request = None

    def _select_rows(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        assert self._request is not None, "only log_probs() may call the model"
        hidden, *others = args
        return hidden.reshape(-1, hidden.shape[-1])[self._request.micro_batch.predictor_indices].unsqueeze(0), *others

    def _forward(
        self, forward: Callable[..., Any], **inputs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        assert self._request is not None, "only log_probs() may call the model"
        micro_batch, temperature, options = self._request
        if self.chunked:
            hidden = self._hidden_states(forward, inputs)
            if hidden is not None:
                terms, bias = head_terms(self._head, hidden)
                return head_log_probs(
                    terms,
                    bias,
                    micro_batch.targets,
                    temperature,
                    function=self._function,
                    kept=micro_batch.kept,
                    **options,
                )
            self._use_plain_head(_OTHER_LOGITS)
        logits = forward(**inputs).logits
        if logits.shape[:2] != (1, len(micro_batch.targets)):
            raise NotImplementedError(
                f"{type(self._model).__name__} returned logits of shape {list(logits.shape)} for "
                f"{len(micro_batch.targets)} hidden states, so its output head cannot be restricted to the response; "
                "this architecture is not supported"
            )
        return token_log_probs(logits.squeeze(0), micro_batch.targets, temperature, kept=micro_batch.kept, **options)

    def _hidden_states(self, forward: Callable[..., Any], inputs: dict[str, Any]) -> torch.Tensor | None:
        """Return the input [N, H] of the head; None if the model's function of the logits is not known."""
        noted: list[torch.Tensor] = []
        values = probe(len(linear_of(self._head).weight), linear_of(self._head).weight.device)

        def note(hidden: torch.Tensor) -> torch.Tensor:
            noted.append(hidden)
            return values.clone()[None, None]

        self._head.forward = note
        try:
            images = forward(**inputs).logits
        finally:
            del self._head.forward
        if len(noted) != 1 or images.shape != (1, 1, len(values)):
            return None
        if self._function is None:
            self._function = fit(values, images[0, 0])
        return None if self._function is None else noted[0].squeeze(0)

    def _use_plain_head(self, reason: str) -> None:
        name = type(self._model).__name__
        if self._requested:
            raise ValueError(f"{KEY}=True is not supported for {name}: {reason}; use null or False")
        logger.warning("%s: %s, so the logits of a micro-batch are kept in memory", name, reason)
        self.chunked = False


def try_chunked_head(config: PreTrainedConfig, trust_remote_code: bool) -> None:
    """Try the chunked head on a small copy of a model, so that a run that requests it fails at its start.

    Args:
        config: the model's config; not changed.

    Raises:
        ValueError: the model's operations on its logits are others than scaling and soft-capping.
    """
    ids = torch.arange(3, 7).unsqueeze(0)
    one = torch.zeros(1, dtype=torch.int64)
    try:
        model = small_model(config, None, trust_remote_code)
        model(input_ids=ids, use_cache=False)
    except Exception as error:  # noqa: BLE001  (code of any model, with sizes for which it was not written)
        logger.warning("%s: a small copy does not run (%s: %s)", type(config).__name__, type(error).__name__, error)
        return
    micro_batch = MicroBatch(ids, torch.arange(4).unsqueeze(0), None, 4, one, one, one, one, slice(0, 1))
    with torch.no_grad():
        OutputHead(model, True).log_probs(micro_batch, 1.0)


def linear_of(head: Any) -> nn.Linear:
    """Return the linear layer of an output head that may have an adapter."""
    adapter = adapter_of(head)
    return head if adapter is None else adapter.base_layer


def why_not_linear(head: Any) -> str | None:
    """Return why `head_log_probs` cannot compute the product of an output head; None if it can."""
    linear = linear_of(head)
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        return f"its output head is a {type(linear).__name__}, not a linear layer"
    if "forward" in vars(linear) or "forward" in vars(head):
        return "its output head computes with the engine's numbers (quantization-aware training)"
    return None


def head_terms(head: Any, hidden: torch.Tensor) -> tuple[list[HeadTerm], torch.Tensor | None]:
    """Return the terms and the bias of the logits of a head, for its input [N, H]."""
    linear, adapter = linear_of(head), adapter_of(head)
    terms = [HeadTerm(hidden, linear.weight)]
    if adapter is not None:
        terms.append(HeadTerm(*adapter.factors(hidden)))
    return terms, linear.bias
