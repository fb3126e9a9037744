"""Measures how much the quantization of layers changes a model's next-token distribution."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from verl.config import RolloutConfig
from verl.utils.hf_config import read_config
from verl.utils.quantization.ascend_description.units import PrecisionUnits
from verl.utils.quantization.formats import ASCEND_METHOD
from verl.workers.engine.attention_choice import choose_attention
from verl.workers.engine.export import WeightExport
from verl.workers.engine.loading import decoder_layer_names, move_model, read_checkpoint
from verl.workers.engine.qat import QatOptions, QuantizedForward
from verl.workers.rollout.quantization import get_scheme

logger = logging.getLogger(__name__)

_SECTION = "actor_rollout_ref.model"
# Tokens, with padding, in one forward pass: limits the memory of the logits.
BATCH_TOKENS = 512
# Two passes that compute the same may differ by the rounding of float32, far below any cost of quantization.
_SAME = 1e-8
# Elements of the logits that one step of the comparison converts.
_PIECE = 1 << 24


def mean_kl(original: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return the sum over tokens of KL(original || quantized) = sum p (log p - log q), in nats.

    With d = log q - log p it is computed as sum p (exp(d) - 1 - d). The value is the same, because both distributions
    sum to 1, but no term is negative, so rounding errors of the size of d do not accumulate.

    Args:
        original: log-probabilities log p [T, V], float32.
        logits: logits of q [T, V], float32.

    Returns:
        a float64 scalar.
    """
    rows = max(1, _PIECE // logits.shape[-1])
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for log_p, piece in zip(original.split(rows), logits.split(rows), strict=True):
        d = piece.log_softmax(-1) - log_p
        total += ((torch.expm1(d) - d) * log_p.exp()).sum(-1).double().sum()
    return total


def load_model(model_dir: str, device: torch.device) -> PreTrainedModel:
    """Read a model whose weights are rounded to bfloat16, as in the engine, and that computes in float32.

    Computing in bfloat16 would add rounding of its own, which differs between any two passes and can exceed the effect
    of quantizing one layer.

    Raises:
        ValueError: the checkpoint does not fit its config.json.
    """
    config = read_config(model_dir, False, {}, _SECTION)
    attention = choose_attention(config, None, packs=False, section=_SECTION, trust_remote_code=False)
    model = read_checkpoint(
        model_dir,
        _SECTION,
        False,
        config=config,
        dtype=torch.bfloat16,
        trust_remote_code=False,
        attn_implementation=attention.implementation,
    )
    model.float().eval()
    move_model(model, device)
    return model


@contextmanager
def _single_process() -> Iterator[None]:
    """Provide the process group that the export of weights asks for its rank."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Sensitivity:
    """A model that runs with any of its units quantized.

    Weights and inputs of quantized layers are rounded by the code of quantization-aware training. A pass repeats only
    the decoder layers from the first quantized one on; the outputs of the layers before it are those of the original
    model. A model whose layers exchange more than their outputs is recognized by a test, and then runs completely.

    Args:
        model: see `load_model`; not sharded.
        model_dir: its directory.
        units: its units.
        prompts: token ids.

    Raises:
        NotImplementedError: a layer that cannot compute with rounded numbers here; the message names it.
        ValueError: the model's own log-probabilities are not finite.
    """

    def __init__(self, model: PreTrainedModel, model_dir: str, units: PrecisionUnits, prompts: Sequence[Sequence[int]]):
        self._model = model
        names = decoder_layer_names(model)
        self._layers = [model.get_submodule(name) for name in names]
        self._forwards: dict[tuple[str, str], list[tuple[nn.Module, Callable[..., Any]]]] = {}
        self._first = {unit.name: len(names) for unit in units.units}
        with _single_process():
            for scheme in dict.fromkeys(scheme for unit in units.units for scheme in unit.saved):
                self._quantize(model_dir, units, scheme, names)
        self._batches = [_Batch(rows, next(model.parameters()).device) for rows in _batches(prompts)]
        self.tokens = sum(int(batch.mask.sum()) for batch in self._batches)
        for batch in self._batches:
            self._record(batch)
        self.reuses_layers = self._can_reuse_layers()

    def _quantize(self, model_dir: str, units: PrecisionUnits, scheme: str, names: Sequence[str]) -> None:
        """Create the quantized forward methods of all units that fit a scheme, without using them yet."""
        description = units.describe({unit.name: scheme for unit in units.units if scheme in unit.saved})
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "description.json"
            file.write_text(json.dumps(description.to_json_dict()), encoding="utf-8")
            rollout = RolloutConfig(
                quantization=ASCEND_METHOD, quantization_config_file=str(file), tensor_model_parallel_size=1
            )
            options = QatOptions(get_scheme(rollout, model_dir), torch.bfloat16)
            quantized = QuantizedForward(self._model, WeightExport(self._model), options)
            quantized.refresh()
        unit_of = {weight: unit.name for unit in units.units for weight in unit.weights}
        for module in quantized.modules:
            found = {unit_of[weight] for weight in module.weights}
            if len(found) > 1:
                raise NotImplementedError(
                    f"{module.name}: the model computes {' and '.join(sorted(found))} in one module, so they cannot be "
                    "measured apart; not supported with --budget"
                )
            (name,) = found
            owner = self._model.get_submodule(module.name)
            self._forwards.setdefault((name, scheme), []).append((owner, module.forward))
            _use_own_forward(owner)
            depth = next((i for i, layer in enumerate(names) if module.name.startswith(f"{layer}.")), 0)
            self._first[name] = min(self._first[name], depth)

    @torch.no_grad()
    def kl(self, schemes: Mapping[str, str]) -> float:
        """Return the mean over tokens of KL(original || quantized), in nats.

        Args:
            schemes: name of each quantized unit -> its scheme.

        Raises:
            ValueError: the quantized model's log-probabilities are not finite.
        """
        first = min((self._first[name] for name in schemes), default=0)
        modules = [pair for choice in schemes.items() for pair in self._forwards[choice]]
        for module, forward in modules:
            module.forward = forward
        try:
            total = sum(
                float(mean_kl(batch.log_probs, self._logits(batch, first if self.reuses_layers else 0)))
                for batch in self._batches
            )
        finally:
            for module, _ in modules:
                _use_own_forward(module)
        if not total < float("inf"):
            raise ValueError(
                f"the log-probabilities are not finite with {len(schemes)} groups of layers quantized "
                f"({next(iter(schemes))}): check the weights of the model, or leave such layers out with --ignore"
            )
        # Rounding can make a divergence of zero a tiny negative number.
        return max(total / self.tokens, 0.0)

    def _record(self, batch: _Batch) -> None:
        """Run the original model and keep its log-probabilities and the outputs of its decoder layers."""
        handles = [
            layer.register_forward_hook(lambda _module, _inputs, output: batch.outputs.append(output))
            for layer in self._layers
        ]
        try:
            with torch.no_grad():
                batch.log_probs = self._logits(batch, 0).log_softmax(-1)
        finally:
            for handle in handles:
                handle.remove()
        if not bool(torch.isfinite(batch.log_probs).all()):
            raise ValueError(
                "the log-probabilities of the unquantized model are not finite, so there is nothing to compare with; "
                "check the weights of the model"
            )

    def _can_reuse_layers(self) -> bool:
        """Return whether the last layer alone, with the kept outputs of all others, computes the same."""
        if not self._layers or any(len(batch.outputs) != len(self._layers) for batch in self._batches):
            return False
        batch = self._batches[0]
        try:
            with torch.no_grad():
                logits = self._logits(batch, len(self._layers) - 1)
            return float(mean_kl(batch.log_probs, logits)) / len(logits) < _SAME
        except Exception as error:  # noqa: BLE001  (code of any model)
            logger.info("layers are not reused: %s: %s", type(error).__name__, error)
            return False

    def _logits(self, batch: _Batch, first: int) -> torch.Tensor:
        """Return the logits [T, V] of all tokens, float32; decoder layers before `first` return their kept outputs."""
        skipped = self._layers[:first]
        for layer, output in zip(skipped, batch.outputs, strict=False):
            layer.forward = lambda *_args, _output=output, **_kwargs: _output
        try:
            return self._model(input_ids=batch.input_ids, use_cache=False).logits[batch.mask].float()
        finally:
            for layer in skipped:
                _use_own_forward(layer)


class _Batch:
    """Prompts as rows with padding at the end, which no token before it can see.

    Attributes:
        input_ids: [B, L].
        mask: [B, L], True for tokens of prompts; T of them.
        outputs: outputs of the original decoder layers, in their order.
        log_probs: [T, V] of the original model.
    """

    def __init__(self, rows: Sequence[Sequence[int]], device: torch.device):
        width = max(map(len, rows))
        padded = [[*row, *[row[-1]] * (width - len(row))] for row in rows]
        self.input_ids = torch.tensor(padded, device=device)
        self.mask = torch.tensor([[i < len(row) for i in range(width)] for row in rows], device=device)
        self.outputs: list[Any] = []
        self.log_probs = torch.empty(0)


def _batches(prompts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Group prompts of similar lengths, at most `BATCH_TOKENS` with padding in a group of two or more."""
    group: list[Sequence[int]] = []
    for prompt in sorted(prompts, key=len):
        if group and len(prompt) * (len(group) + 1) > BATCH_TOKENS:
            yield group
            group = []
        group.append(prompt)
    yield group


def _use_own_forward(module: nn.Module) -> None:
    """Remove a forward method that was set on the instance."""
    module.__dict__.pop("forward", None)
