"""Errors that an engine's quantization causes in the output of each layer, measured in a pass of the trainer's model.

Every quantized layer multiplies its input twice: unrounded, and with the numbers that the engine multiplies. A layer's
input comes from the pass of the model, so the error of a layer does not contain those of the layers before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from verl.utils.quantization.encode_report import Errors
from verl.workers.engine.experts import has_plain_experts, rows_of_experts, sort_by_expert
from verl.workers.engine.export import WeightExport
from verl.workers.engine.lora import adapter_of
from verl.workers.engine.qat import QatOptions, by_module


class OutputErrors:
    """Measures the passes of a model inside a `with` block.

    Layers that are neither linear nor plain experts are left out. Of a layer with an adapter, the weight without it is
    measured.

    Args:
        model: loaded and sharded.
        export: the model's export.
        options: the numbers of the engine.

    Attributes:
        errors: parameter -> sum of the squared errors of the outputs, and of the squared outputs, without a bias, over
            the positions of this rank.
    """

    def __init__(self, model: PreTrainedModel, export: WeightExport, options: QatOptions):
        self.errors: Errors = {}
        self._model, self._export, self._options = model, export, options
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        scheme = self._options.scheme
        quantized = {
            name: targets[0].name
            for name, _, targets in self._export.row_ranges()
            if all(scheme.encodes_rows(target.name) for target in targets)
        }
        for owner, weights in by_module(quantized).items():
            module = self._model.get_submodule(owner)
            if weights.keys() == {"weight"} and isinstance(_linear(module), nn.Linear):
                self._handles.append(module.register_forward_hook(self._linear_hook(owner, weights)))
            elif weights.keys() == {"gate_up_proj", "down_proj"} and has_plain_experts(module):
                self._handles.append(module.register_forward_hook(self._experts_hook(owner, weights)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        scheme = self._options.scheme
        scheme.pop_report()  # of the weights that were encoded here

    def _linear_hook(self, owner: str, weights: Mapping[str, str]) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            weight = _linear(module).weight
            self._multiply(f"{owner}.weight", weights["weight"], inputs[0].flatten(0, -2), weight)

        return hook

    def _experts_hook(self, owner: str, weights: Mapping[str, str]) -> Any:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            hidden_states, top_k_index, _ = inputs
            order, counts = sort_by_expert(top_k_index, module.num_experts)
            rows = hidden_states[order // top_k_index.shape[-1]]
            for expert, x in rows_of_experts(rows, counts):
                products = {"gate_up_proj": x}
                for name in ("gate_up_proj", "down_proj"):
                    weight = getattr(module, name)[expert]
                    y = self._multiply(f"{owner}.{name}", weights[name], products[name], weight)
                    if name == "gate_up_proj":
                        gate, up = y.chunk(2, dim=-1)
                        products["down_proj"] = (module.act_fn(gate) * up).to(x.dtype)

        return hook

    @torch.no_grad()
    def _multiply(self, name: str, checkpoint_name: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Add the error of a product to that of a parameter; return the unrounded product x @ weight.T in float32.

        Args:
            x: [T, K].
            weight: [N, K].
        """
        scheme, options = self._options.scheme, self._options
        parts = scheme.encode_weight(checkpoint_name, weight.detach(), options.dtype)
        exact = F.linear(x.float(), weight.float())
        rounded = F.linear(scheme.round_activations(x).float(), scheme.decode_weight(parts, torch.float32))
        found = torch.stack([(rounded - exact).square().sum(), exact.square().sum()]).tolist()
        total = self.errors.setdefault(name, [0.0, 0.0])
        total[0], total[1] = total[0] + found[0], total[1] + found[1]
        return exact


def _linear(module: nn.Module) -> Any:
    """Return the linear layer of a module that may have an adapter."""
    adapter = adapter_of(module)
    return module if adapter is None else adapter.base_layer
