"""Log-probabilities of an eager float32 model, one sequence at a time: the reference of `consistency`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from verl.protocol import DataProto
from verl.workers.engine.rope import fix_rope_length

# Draws of the noise in the inputs of quantized layers.
_DRAWS = 3


class ReferenceUnavailable(RuntimeError):
    """There is no reference; the message gives the reason."""


@dataclass(frozen=True)
class ReferenceLogProbs:
    """Log-probabilities [B, T] float32 of the response tokens, 0 where response_mask is 0.

    Attributes:
        log_probs: of the float32 model.
        as_trainer, as_engine: of the same model with an error as large as the rounding of trainer and engine: computed
            in their dtype, and for quantized weights with noise of the relative error of their format, in the weights
            and in the inputs of their layers. Of a few draws of the inputs' noise the one that changes most: where
            small changes send a token to other experts, draws differ severalfold.
    """

    log_probs: torch.Tensor
    as_trainer: torch.Tensor
    as_engine: torch.Tensor


def reference_log_probs(
    directory: str | Path,
    batch: DataProto,
    *,
    trainer_dtype: str,
    engine_dtype: str,
    trainer_quantized: bool,
    weight_error: float | None,
    max_model_len: int,
    trust_remote_code: bool,
) -> ReferenceLogProbs:
    """Load a model on the CPU and compute the log-probabilities of a batch.

    Args:
        directory: Hugging Face directory.
        batch: columns of a forward pass; meta_info `temperature`.
        trainer_dtype, engine_dtype: torch dtype names.
        trainer_quantized: True if the trainer computes with the engine's quantized weights.
        weight_error: relative root mean square error of the engine's weights, see `WeightFormat.weight_error`; None if
            they are not quantized.
        max_model_len: the engine's limit of a sequence in tokens; see `verl.workers.engine.rope`.

    Raises:
        ReferenceUnavailable: transformers cannot load or run the model.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager", trust_remote_code=trust_remote_code
        ).eval()
        fix_rope_length(model, max_model_len)
        rounded = {"float32": _log_probs(model, batch)}
        for dtype in sorted({trainer_dtype, engine_dtype} - rounded.keys()):
            rounded[dtype] = _log_probs(_in_dtype(model, dtype), batch)
        as_trainer, as_engine = rounded[trainer_dtype], rounded[engine_dtype]
        if weight_error is not None:
            _add_noise(model, weight_error)
            with _noisy_inputs(_in_dtype(model, engine_dtype), weight_error):
                draws = [_log_probs(model, batch) for _ in range(_DRAWS)]
            as_engine = max(draws, key=lambda draw: (draw - rounded["float32"]).abs().sum().item())
            as_trainer = as_engine if trainer_quantized else as_trainer
    except (ValueError, RuntimeError, OSError, ImportError, TypeError, KeyError, AttributeError) as error:
        raise ReferenceUnavailable(f"transformers cannot compute it ({type(error).__name__}: {error})") from error
    return ReferenceLogProbs(rounded["float32"], as_trainer, as_engine)


@torch.no_grad()
def _log_probs(model: PreTrainedModel, batch: DataProto) -> torch.Tensor:
    columns = batch.batch
    result = torch.zeros(columns["response_mask"].shape)
    for row in range(len(batch)):
        attended = columns["attention_mask"][row].bool()
        ids, length = columns["input_ids"][row][attended], int(columns["response_mask"][row].sum())
        logits = model(input_ids=ids[None]).logits[0, -length - 1 : -1].float() / batch.meta_info["temperature"]
        result[row, :length] = torch.log_softmax(logits, -1).gather(1, ids[-length:, None])[:, 0]
    return result


def _in_dtype(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """Round the parameters to `dtype`, in place, but none that trainers and engines keep in float32.

    Buffers keep their dtype: frequencies of rotary embeddings, and biases that select experts.
    """
    kept = tuple(model._keep_in_fp32_modules_strict or ())
    for name, parameter in model.named_parameters():
        if not any(part in name for part in kept):
            parameter.data = parameter.data.to(getattr(torch, dtype))
    return model


def _add_noise(model: PreTrainedModel, error: float) -> None:
    """Multiply every weight of the decoder layers by 1 + normal noise of a relative error."""
    generator = torch.Generator().manual_seed(0)
    for module in _matrix_modules(model):
        for parameter in module.parameters(recurse=False):
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.data.mul_(1 + error * noise)


@contextlib.contextmanager
def _noisy_inputs(model: PreTrainedModel, error: float) -> Iterator[None]:
    """In the block, multiply every input of a layer with matrices by 1 + normal noise of a relative error."""
    generator = torch.Generator().manual_seed(1)

    def add_noise(module: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if not arguments:
            return arguments
        first, *others = arguments
        noise = torch.randn(first.shape, generator=generator, dtype=torch.float32)
        return ((first * (1 + error * noise)).to(first.dtype), *others)

    with contextlib.ExitStack() as stack:
        for module in _matrix_modules(model):
            stack.callback(module.register_forward_pre_hook(add_noise).remove)
        yield


def _matrix_modules(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Return the modules of the decoder layers that hold a matrix, or several of them in one tensor."""
    embeddings = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    return [
        module
        for module in model.modules()
        if any(p.ndim > 1 and id(p) not in embeddings for p in module.parameters(recurse=False))
    ]
