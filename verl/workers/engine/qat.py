"""Quantization-aware training: the policy's forward pass with the numbers that a quantized engine computes with.

The engine rounds weights to its dtype and quantizes them, and it quantizes the inputs of these layers for each token.
Here the same layers multiply the same numbers: the weights are the bytes that a weight update sends, decoded, and the
inputs are rounded by the same scheme. So both sides compute the same policy, up to the order of sums.

The rounding has no useful derivative. Gradients pass it unchanged (straight-through estimator: Bengio et al. 2013,
"Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation") and reach the master
weights, which stay unrounded.

Each rank encodes the rows that it holds once per optimizer step (`QuantizedForward.refresh`), and the weight update
sends these bytes. A pass gathers the encoded rows of all ranks, a quarter of the bytes of float32. Nothing unquantized
is kept for the backward pass: it decodes the weights again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from verl.utils.quantization.encode_report import EncodeReport
from verl.utils.quantization_scheme import QuantizationScheme
from verl.workers.engine.experts import has_plain_experts, rows_of_experts, sort_by_expert
from verl.workers.engine.export import RowShardedParam, WeightExport, gather_rows
from verl.workers.engine.lora import adapter_of

T = TypeVar("T")

_HOW_TO_LEAVE_OUT = (
    "leave it out of the engine's quantization (actor_rollout_ref.rollout.quantization_config_file), or set "
    "actor_rollout_ref.actor.fsdp_config.qat.enable=False"
)


@dataclass(frozen=True)
class QatOptions:
    """How the forward pass of a model is quantized.

    Attributes:
        scheme: the engine's quantization; it determines the layers.
        dtype: the engine's dtype, to which weights are rounded before they are quantized.
        activations: quantize the inputs of the layers too.
        mask_saturated: no gradient for numbers that saturate, whose rounded value does not follow them.
    """

    scheme: QuantizationScheme
    dtype: torch.dtype
    activations: bool = True
    mask_saturated: bool = False


@dataclass
class _Weight:
    """A parameter that the engine holds quantized.

    Attributes:
        shard: the parameter, or this rank's part of it.
        parts: encoded rows of this rank, by suffix of the tensor's name.
    """

    shard: torch.Tensor
    parts: dict[str, torch.Tensor] = field(default_factory=dict)

    def gather(self) -> list[torch.Tensor]:
        """Return the encoded rows of all ranks, one tensor for each suffix. Collective."""
        assert self.parts, "refresh() encodes the weights before a forward pass"
        return [gather_rows(part, self.shard) for part in self.parts.values()]


@dataclass(frozen=True)
class QuantizedModule:
    """A module that computes with the engine's numbers.

    Attributes:
        name: of the module in the model.
        weights: checkpoint names of its quantized weights.
        forward: its quantized forward method.
    """

    name: str
    weights: frozenset[str]
    forward: Callable[..., torch.Tensor]


class QuantizedForward:
    """The quantized forward pass of one model.

    Attributes:
        modules: the modules whose forward methods it replaced.

    Args:
        model: loaded and sharded; the forward methods of its quantized layers are replaced.
        export: the model's export, which encodes its rows.

    Raises:
        NotImplementedError: the engine quantizes a weight whose layer cannot compute with rounded numbers here.
    """

    def __init__(self, model: PreTrainedModel, export: WeightExport, options: QatOptions):
        self._export, self._options = export, options
        self._weights: dict[str, _Weight] = {}
        self._stale = True
        self._report = EncodeReport()
        self._last_input = _LastInput(options)
        self.modules = self._install(model)

    @property
    def report(self) -> EncodeReport:
        """Time and errors of the last `refresh` that encoded weights."""
        return self._report

    @property
    def encoded(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """This rank's encoded rows after `refresh`: parameter -> suffix -> rows. Later calls do not change them."""
        return {name: weight.parts for name, weight in self._weights.items()}

    def mark_stale(self) -> None:
        """Note that the weights have changed."""
        self._stale = True

    def refresh(self) -> None:
        """Encode the rows that this rank holds, if the weights have changed. Collective."""
        if not self._stale:
            return
        for unit in self._export.units(dtype=self._options.dtype, encoder=self._options.scheme, whole_rows=False):
            if isinstance(unit, RowShardedParam) and unit.name in self._weights:
                self._weights[unit.name].parts = {suffix: part.contiguous() for suffix, part in unit.parts.items()}
        self._report, self._stale = self._options.scheme.pop_report(), False

    def _install(self, model: PreTrainedModel) -> tuple[QuantizedModule, ...]:
        scheme = self._options.scheme
        targets_of: dict[str, frozenset[str]] = {}
        for name, shard, targets in self._export.row_ranges():
            if not any(scheme.quantizes(target.name) for target in targets):
                continue
            if not all(scheme.encodes_rows(target.name) for target in targets):
                raise NotImplementedError(
                    f"{name}: the engine quantizes a part of this parameter only, which is not supported with "
                    f"quantization-aware training; {_HOW_TO_LEAVE_OUT}"
                )
            self._weights[name] = _Weight(shard)
            targets_of[name] = frozenset(target.name for target in targets)
        missing = sorted(set(scheme.quantized_names()) - frozenset().union(*targets_of.values()))
        if missing:
            raise NotImplementedError(
                f"{missing[0]} ({len(missing)} such weights): the engine quantizes it, but {type(model).__name__} "
                "holds it in another form, which is not supported with quantization-aware training; "
                f"{_HOW_TO_LEAVE_OUT}"
            )
        modules = []
        for owner, weights in by_module(self._weights).items():
            module = model.get_submodule(owner)
            module.forward = self._forward_of(owner, module, weights)
            names = frozenset().union(*(targets_of[f"{owner}.{last}"] for last in weights))
            modules.append(QuantizedModule(owner, names, module.forward))
        return tuple(modules)

    def _forward_of(self, name: str, module: nn.Module, weights: Mapping[str, _Weight]) -> Callable[..., torch.Tensor]:
        """Return the forward method of a module whose quantized parameters are `weights`."""
        adapter = adapter_of(module)
        linear = module if adapter is None else adapter.base_layer
        if weights.keys() == {"weight"} and isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward:
            if adapter is None:
                return lambda x: self._linear(x, linear.weight, linear.bias, weights["weight"])
            return lambda x: self._adapted(x, linear, adapter, weights["weight"])
        if weights.keys() == {"gate_up_proj", "down_proj"} and has_plain_experts(module):
            return lambda *inputs: self._experts(module, weights, *inputs)
        raise NotImplementedError(
            f"{name} ({type(module).__name__}): the engine quantizes it, but quantization-aware training knows linear "
            f"layers and experts with a gate only; {_HOW_TO_LEAVE_OUT}"
        )

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, held: _Weight) -> torch.Tensor:
        """Return round(x) @ decoded.T + bias, for x [..., K] and a weight [N, K]."""
        rounded = self._last_input.rounded(x).flatten(0, -2)
        flat = _StraightThrough.apply(x.flatten(0, -2), weight, bias, rounded, held, self._options, None)
        return flat.unflatten(0, x.shape[:-1])

    def _adapted(self, x: torch.Tensor, linear: nn.Linear, adapter: Any, held: _Weight) -> torch.Tensor:
        """Return the output of a layer with an adapter; `held` is the weight with the adapter merged."""
        output = self._linear(x, linear.weight, linear.bias, held)
        # The merged weight is W + scale * B @ A, so A and B have the gradients of scale * B @ A @ round(x), whose value
        # is in the output already. Subtracting it from itself leaves zeros.
        update = adapter.update(self._last_input.rounded(x))
        return output + (update - update.detach())

    def _experts(
        self,
        module: Any,
        weights: Mapping[str, _Weight],
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Return the weighted sum of each token's experts, computed as by the engine.

        Args:
            hidden_states: [T, H].
            top_k_index, top_k_weights: [T, top k], experts of each token and their weights.

        Returns:
            [T, H] in the dtype of hidden_states.
        """
        order, counts = sort_by_expert(top_k_index, module.num_experts)
        token = order // top_k_index.shape[-1]
        rounded = self._last_input.rounded(hidden_states)[token]

        def product(x: torch.Tensor, rounded: torch.Tensor, name: str) -> torch.Tensor:
            weight = getattr(module, name)
            return _StraightThrough.apply(x, weight, None, rounded, weights[name], self._options, counts)

        gate, up = product(hidden_states[token], rounded, "gate_up_proj").chunk(2, dim=-1)
        # The engine's kernel does not round between the products.
        inner = module.act_fn(gate.float()) * up.float()
        output = product(inner, _rounded(inner, self._options).to(hidden_states.dtype), "down_proj")
        weighted = output.float() * top_k_weights.flatten()[order, None].float()
        total = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
        return total.index_add(0, token, weighted).to(hidden_states.dtype)


class _StraightThrough(torch.autograd.Function):
    """round(x) @ decoded.T + bias, with the gradients of a product of unrounded numbers."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        rounded: torch.Tensor,
        held: _Weight,
        options: QatOptions,
        counts: Sequence[int] | None,
    ) -> torch.Tensor:
        """Multiply.

        Args:
            x: [T, K], and `rounded` its rounded value, in the dtype of the computation.
            weight: [N, K], or [E, N, K] with `counts`; `held` are its encoded rows.
            counts: rows of x of each expert, in order; None for a linear layer.

        Returns:
            [T, N].
        """
        encoded = held.gather()
        ctx.options, ctx.counts, ctx.suffixes = options, counts, tuple(held.parts)
        ctx.save_for_backward(rounded, *encoded, *((x, weight) if options.mask_saturated else ()))
        products = [
            F.linear(rows, options.scheme.decode_weight(_parts(ctx, encoded, expert), rounded.dtype), bias)
            for expert, rows in rows_of_experts(rounded, counts)
        ]
        return torch.cat(products)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        rounded, *saved = ctx.saved_tensors
        encoded, sources = saved[: len(ctx.suffixes)], saved[len(ctx.suffixes) :]
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        scheme = ctx.options.scheme
        grad_x, grad_weight = [], None
        if needs_weight:
            shape = (*encoded[0].shape[:-1], rounded.shape[-1])
            grad_weight = torch.zeros(shape, dtype=rounded.dtype, device=grad.device)
        for (expert, rows), (_, inputs) in zip(
            rows_of_experts(grad, ctx.counts), rows_of_experts(rounded, ctx.counts), strict=True
        ):
            parts = _parts(ctx, encoded, expert)
            if needs_x:
                grad_x.append(rows @ scheme.decode_weight(parts, rounded.dtype))
            if grad_weight is not None:
                of_expert = grad_weight if expert is None else grad_weight[expert]
                torch.mm(rows.T, inputs, out=of_expert)
                if sources:
                    weight = sources[1] if expert is None else sources[1][expert]
                    of_expert.masked_fill_(scheme.saturated(weight, parts), 0)
        x = torch.cat(grad_x) if needs_x else None
        if x is not None and sources:
            x = x.masked_fill(scheme.saturated(sources[0]), 0)
        return x, grad_weight, grad.sum(0) if needs_bias else None, None, None, None, None


def _parts(ctx: Any, encoded: Sequence[torch.Tensor], expert: int | None) -> dict[str, torch.Tensor]:
    """Return the encoded rows of a linear layer (None) or of an expert, by suffix."""
    rows = encoded if expert is None else [part[expert] for part in encoded]
    return dict(zip(ctx.suffixes, rows, strict=True))


def _rounded(x: torch.Tensor, options: QatOptions) -> torch.Tensor:
    """Return x as the engine's kernels see it."""
    return options.scheme.round_activations(x) if options.activations else x


class _LastInput:
    """Rounds the input of layers, and once only for layers that follow each other with the same input (q, k and v)."""

    def __init__(self, options: QatOptions):
        self._options = options
        self._input: weakref.ref[torch.Tensor] | None = None
        self._version = -1
        self._rounded = torch.empty(0)

    @torch.no_grad()
    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [..., K], rounded, without a gradient."""
        last = None if self._input is None else self._input()
        if last is not x or self._version != x._version:
            self._rounded = _rounded(x.detach(), self._options)
            self._input, self._version = weakref.ref(x), x._version
        return self._rounded


def by_module(weights: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """Group the values of parameters by the name of their module."""
    modules: dict[str, dict[str, T]] = {}
    for name, weight in weights.items():
        owner, _, last = name.rpartition(".")
        modules.setdefault(owner, {})[last] = weight
    return modules
