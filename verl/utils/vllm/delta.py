"""Apply deltas to a running vLLM engine; the full load before them is in `reload`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from verl.utils.quantization_scheme import QuantizationScheme
from verl.utils.vllm.apply_delta import DeltaApplier
from verl.utils.vllm.layerwise import (
    LayerSubset,
    absorbed_projections,
    begin_reload,
    finish_reload,
    keeps_derived_copy,
    load_weights,
    post_processing,
)
from verl.utils.vllm.layout_map import LayoutMap
from verl.utils.vllm.npu_vllm_patch import restore_expert_parameters


class EngineDelta:
    """Applies deltas, once a full load has been recorded.

    A model with multi-head latent attention takes none: its attention computes with matrices that vLLM derives from a
    projection, and would keep those of the last full update.

    Args:
        model: the engine's model.
        model_config: its vLLM `ModelConfig`.
        context: makes the context in which vLLM's functions run.
        hooks: the quantization scheme of the rollout, if any.
    """

    def __init__(
        self,
        model: nn.Module,
        model_config: Any,
        context: Callable[[], AbstractContextManager[None]],
        hooks: QuantizationScheme | None,
    ):
        self._model, self._model_config, self._context, self._hooks = model, model_config, context, hooks
        self._applier: DeltaApplier | None = None
        self._supported = not absorbed_projections(model)

    @property
    def needs_record(self) -> bool:
        """Whether the next full load must be recorded."""
        return self._supported and self._applier is None

    @property
    def accepted(self) -> bool:
        """Whether single elements can be changed: a full load was recorded, and all needed copies were made."""
        return self._applier is not None and self._applier.complete

    def record(
        self,
        layout: LayoutMap,
        layers: Mapping[str, nn.Module],
        expected: Mapping[str, int],
        tied: Mapping[str, nn.Module],
        derived: Mapping[str, Callable[[], None]],
    ) -> None:
        """Take the record of a full load.

        Args:
            layout: the recorded positions.
            layers: layers of the model that vLLM's reload loads, by name.
            expected: elements that a checkpoint writes into each of them.
            tied: those of them that take their weight from another layer.
            derived: tied layers that keep something computed from the shared weight -> function that computes it.
        """
        mapped: dict[str, int] = {}
        for name, count in layout.mapped_elements().items():
            layer = name.rpartition(".")[0]
            mapped[layer] = mapped.get(layer, 0) + count
        reloaded = {
            name: layer for name, layer in layers.items() if name not in tied and mapped.get(name, 0) < expected[name]
        }
        # On a CPU, a packed or dequantized copy is kept beside the parameter.
        packed = {
            name: compute
            for name, layer in layers.items()
            if name not in reloaded
            and keeps_derived_copy(self._model, layer)
            and (compute := post_processing(layer)) is not None
        }
        self._applier = DeltaApplier(
            self._model,
            layout,
            reloaded=reloaded,
            derived={**derived, **packed},
            refresh=lambda indices: self._hooks.refresh(self._model, indices) if self._hooks is not None else None,
            reload=self._reload,
        )

    def keep(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy the tensors of a later full load that deltas need in the checkpoint layout."""
        if self._applier is not None:
            self._applier.keep(tensors)

    def begin(self) -> None:
        """Prepare the engine for a delta.

        Raises:
            RuntimeError: no load was recorded, or a parameter was moved in memory: a full update is needed.
        """
        restore_expert_parameters(self._model)
        if self._hooks is not None:
            self._hooks.begin_delta(self._model)
        if not self._supported:
            raise RuntimeError("cannot apply a delta: multi-head latent attention needs a full update")
        if not self.accepted:
            raise RuntimeError("cannot apply a delta: no full load of this engine was recorded yet")
        moved = self._require_applier().moved_parameter()
        if moved is not None:
            self._applier = None
            raise RuntimeError(f"cannot apply a delta: {moved} is no longer in the memory that it was loaded into")

    def apply_chunk(self, name: str, indices: torch.Tensor | None, start: int, values: torch.Tensor) -> None:
        """Change elements of a checkpoint tensor; see `DeltaApplier.apply_chunk`."""
        self._require_applier().apply_chunk(name, indices, start, values)

    def refresh_derived(self) -> None:
        """Compute again what is derived from the changed weights, while the next bucket is on its way."""
        with self._context():
            self._require_applier().refresh_derived()

    def finish(self) -> None:
        """Complete a delta after its last bucket."""
        with self._context():
            self._require_applier().finish()
        if self._hooks is not None:
            self._hooks.check_engine(self._model)

    def _require_applier(self) -> DeltaApplier:
        assert self._applier is not None, "no full load was recorded"
        return self._applier

    def _reload(self, layers: Mapping[str, nn.Module], tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        subset = LayerSubset(self._model, layers.values())
        begin_reload(subset)
        load_weights(self._model, tensors)
        finish_reload(subset, self._model_config)
