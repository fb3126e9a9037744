"""Divide the decoder layers of a model among ranks, as transformers' plan of the model (`tp_plan`) tells.

Each rank holds a slice of some parameters as if they were the whole ones, and FSDP shards this slice over the ranks
with other data. Embedding, last norm and output head are not divided: FSDP shards them over all ranks.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import PreTrainedModel

from verl.utils.quantization.formats import MX_BLOCK_SIZE
from verl.utils.tensor_ranks import SharedInputs, TensorRanks
from verl.workers.engine.experts import has_plain_experts

DATA, TENSOR = "data", "tensor"
_COLUMNS, _ROWS, _EXPERTS, _PARTIAL = "colwise", "rowwise", "moe_tp_experts", "replicated_with_grad_allreduce"
_KEY = "fsdp_config.tensor_parallel_size"


@dataclass
class TensorParallel:
    """The divided layers of one model.

    Attributes:
        ranks: the ranks that share each layer with this rank.
        grid: [tensor, data] mesh of all ranks: those along `tensor` share layers, those along `data` have other data.
    """

    ranks: TensorRanks
    grid: DeviceMesh
    _styles: dict[str, str] = field(default_factory=dict)  # module -> style of the plan
    _layers: set[str] = field(default_factory=set)  # parameters of the decoder layers
    _cuts: dict[str, int] = field(default_factory=dict)  # parameter -> dimension in which it is divided

    def divide(self, model: PreTrainedModel, layers: list[str]) -> None:
        """Replace parameters of a model without storage by this rank's slices.

        Args:
            layers: names of the decoder layers.

        Raises:
            ValueError: the model has no plan, or one with parts that are not supported; sizes do not divide.
        """
        for number in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(model.config, number, None) or self.ranks.size
            if heads % self.ranks.size:
                raise ValueError(f"{_KEY}={self.ranks.size}: must divide {number}={heads} of {type(model).__name__}")
        prefixes = tuple(f"{layer}." for layer in layers)
        self._layers = {name for name, _ in model.named_parameters() if name.startswith(prefixes)}
        plan: dict[str, str] = dict(model.tp_plan or {})
        for name, module in model.named_modules():
            style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
            if style is not None and name.startswith(prefixes):
                self._styles[name] = style
                self._divide_module(f"{type(model).__name__}.{name}", name, module, style)
        if not self._cuts:
            raise ValueError(f"{type(model).__name__} has no tensor-parallel plan in transformers; use {_KEY}=1")

    def _divide_module(self, shown: str, name: str, module: Any, style: str) -> None:
        size = self.ranks.size
        if style == _PARTIAL:
            return
        if style == _EXPERTS:
            if not has_plain_experts(module):
                raise ValueError(f"{shown}: experts of this form cannot be divided among ranks; use {_KEY}=1")
            cuts = {last: 0 for last, _ in module.named_parameters()}
        elif type(module) is nn.Linear and style in (_COLUMNS, _ROWS):
            if style == _ROWS and module.bias is not None:
                raise ValueError(f"{shown}: a bias of a layer whose inputs are divided is not supported; use {_KEY}=1")
            cuts = {last: int(style == _ROWS) for last, _ in module.named_parameters()}
        else:
            raise ValueError(
                f"{shown}: the plan divides this {type(module).__name__} as {style!r}, which is not supported; "
                f"use {_KEY}=1"
            )
        for last, dim in cuts.items():
            whole = getattr(module, last)
            shape = list(whole.shape)
            if shape[dim] % size:
                raise ValueError(
                    f"{_KEY}={size}: must divide the {shape[dim]} "
                    f"{'experts' if style == _EXPERTS else 'inputs' if dim else 'outputs'} of {shown}"
                )
            shape[dim] //= size
            part = torch.empty(shape, dtype=whole.dtype, device=whole.device)
            module.register_parameter(last, nn.Parameter(part, requires_grad=whole.requires_grad))
            self._cuts[f"{name}.{last}"] = dim
        if style == _EXPERTS:
            module.num_experts //= size
            module._is_expert_parallel = True  # transformers then expects numbers of experts of other ranks

    def check_blocks(self, model: PreTrainedModel) -> None:
        """Check that no block of numbers with a common scale is divided.

        Raises:
            ValueError: a slice of a row is no multiple of a block.
        """
        for name, dim in self._cuts.items():
            inputs = model.get_parameter(name).shape[-1]
            if dim == 1 and inputs % MX_BLOCK_SIZE:
                raise ValueError(
                    f"{_KEY}={self.ranks.size}: leaves {inputs} inputs of {name} to each rank, which is no multiple of "
                    f"the {MX_BLOCK_SIZE} with a common scale; use a smaller size, or fsdp_config.qat.enable=False"
                )

    def install(self, model: PreTrainedModel) -> None:
        """Add the sums over the ranks to the forward functions of the divided modules, after all other changes."""
        inputs = SharedInputs()
        for name, style in self._styles.items():
            module: Any = model.get_submodule(name)
            if style == _COLUMNS:
                module.forward = self.ranks.columns(module.forward, inputs)
            elif style == _ROWS:
                module.forward = self.ranks.rows(module.forward)
            elif style == _EXPERTS:
                module.forward = self.ranks.experts(module.forward, module.num_experts, inputs)

    def whole(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """Return a parameter, its gradient or a state of the optimizer as a part of the undivided parameter.

        Args:
            name: of the parameter.
            part: this rank's slice, sharded over the ranks with other data. The result shares its memory.
        """
        if name not in self._layers or not isinstance(part, DTensor):
            return part
        cut, shape = self._cuts.get(name), list(part.shape)
        if cut is not None:
            shape[cut] *= self.ranks.size
        with torch.no_grad():
            return DTensor.from_local(
                part.to_local(),
                self.grid,
                [Replicate() if cut is None else Shard(cut), Shard(0)],
                run_check=False,
                shape=torch.Size(shape),
                stride=torch.empty(shape, device="meta").stride(),
            )

    def gives_whole_rows(self, name: str, whole: torch.Tensor) -> bool:
        """Return True if the ranks divide the rows of a parameter, and `whole_rows` gives each rank as many of them."""
        return self._cuts.get(name) == 1 and whole.shape[0] % self.grid.size() == 0

    @torch.no_grad()
    def whole_rows(self, whole: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """Return a parameter whose rows are divided as one of which each rank holds whole rows. Collective.

        Args:
            whole: result of `whole`.
            part: [n, k], what this rank holds of it, or an encoded form of this; on the device `meta` for the layout.
        """
        size = self.ranks.size
        layout = part.device.type == "meta"
        rows = part.new_empty(part.shape[0] // size, part.shape[1] * size) if layout else self.ranks.to_rows(part)
        shape = torch.Size([whole.shape[0], rows.shape[1]])
        return DTensor.from_local(
            rows, self.by_row, [Shard(0), Shard(0)], run_check=False, shape=shape, stride=(shape[1], 1)
        )

    @functools.cached_property
    def by_row(self) -> DeviceMesh:
        """[data, tensor] mesh, in the order of the ranks."""
        return DeviceMesh(self.grid.device_type, self.grid.mesh.T.contiguous(), mesh_dim_names=(DATA, TENSOR))

    @torch.no_grad()
    def complete_gradients(self, model: PreTrainedModel) -> None:
        """Make the gradients of undivided parameters of the layers complete, and equal on all ranks. Collective.

        Norms of single heads get a part of their gradient on each rank. The gradients of other parameters could differ
        between ranks by rounding only, but the parameters would drift apart.
        """
        found: list[tuple[torch.Tensor, int]] = []
        for name, parameter in model.named_parameters():
            if name in self._layers and name not in self._cuts and parameter.grad is not None:
                partial = self._sees_own_heads(name.rpartition(".")[0])
                found.append((_local(parameter.grad), 1 if partial else self.ranks.size))
        if not found:
            return
        flat = torch.cat([grad.float().flatten() for grad, _ in found])
        self.ranks.sum_(flat)
        for (grad, copies), total in zip(found, flat.split([grad.numel() for grad, _ in found]), strict=True):
            grad.copy_((total / copies).view_as(grad))

    def _sees_own_heads(self, module: str) -> bool:
        """Return True for the norm of single heads, by the plan, or beside divided projections to heads."""
        return self._styles.get(module) == _PARTIAL or f"{module.rpartition('.')[0]}.q_proj" in self._styles

    def counted(self, model: PreTrainedModel) -> Iterator[nn.Parameter]:
        """Iterate over the parameters of which this rank's part is in no other rank: sums over all ranks count them."""
        for name, parameter in model.named_parameters():
            if self.ranks.rank == 0 or name not in self._layers or name in self._cuts:
                yield parameter


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
