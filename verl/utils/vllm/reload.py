"""Load full updates into a running vLLM engine; deltas are in `delta`.

Everything that reaches into vLLM to load weights is in this file, `layerwise` and `delta`, so a new release means three
files to read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from verl.utils.quantization_scheme import QuantizationScheme
from verl.utils.vllm.delta import EngineDelta
from verl.utils.vllm.layerwise import (
    LayerSubset,
    abandon_reload,
    awaits_weights,
    begin_reload,
    expected_numel,
    finish_reload,
    layer_info,
    load_weights,
    loaded_in_place,
    never_loaded,
    post_processing,
    shared_layers,
)
from verl.utils.vllm.layout_map import LoadTrace, parameters_by_storage, storage_of
from verl.utils.vllm.npu_vllm_patch import restore_expert_parameters
from verl.utils.vllm.write_log import WriteLog

# Buffers that old checkpoints contain and that models compute from their config.
_COMPUTED = (".rotary_emb.inv_freq", ".rotary_pos_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")


class LayerwiseLoadSession:
    """Loads checkpoint tensors into a running model through vLLM's layer-wise reload.

    The reload has four gaps, which this class closes: a tied output head keeps the GEMM that was packed from the old
    weights; experts on a CPU are not packed again, so that plain weights would be read as packed ones; and neither a
    layer that was loaded in part is an error, nor a router without its bias.

    Layers that `hooks` handle are excluded from the reload and written in place by their own loaders. `shared_layers`
    are excluded too.

    Args:
        model: the engine's model.
        vllm_config: its `VllmConfig`.
        device: device of its parameters.
        hooks: the quantization scheme of the rollout, if any.

    Attributes:
        delta: applies deltas.
    """

    def __init__(
        self, model: nn.Module, vllm_config: Any, device: torch.device, hooks: QuantizationScheme | None = None
    ):
        self._model = model
        self._vllm_config = vllm_config
        self._device = device
        self._hooks = hooks
        self._trace: LoadTrace | None = None
        # The tensors that were seen to be used, and the dtypes in which the engine holds them.
        self._held: dict[str, torch.dtype | None] = {}
        self.delta = EngineDelta(model, vllm_config.model_config, self._context, hooks)

    def begin(self) -> None:
        """Bring every layer to the checkpoint layout."""
        abandon_reload(self._model)
        restore_expert_parameters(self._model)
        in_place = self._hooks.begin(self._model) if self._hooks is not None else {}
        watched = loaded_in_place(self._model) | {
            f"{name}.{key}": parameter
            for name, layer in in_place.items()
            for key, parameter in layer._parameters.items()
            if parameter is not None and key not in never_loaded()
        }
        self._log = WriteLog(watched)
        self._watch = self._log if watched else nullcontext()
        excluded = {id(layer) for layer in (*in_place.values(), *shared_layers())}
        self._reloaded = LayerSubset(
            self._model, (layer for layer in self._model.modules() if id(layer) not in excluded)
        )
        # The parameters before the reload: during it, the layers hold placeholders on the meta device.
        self._owners = {
            name: layer for name, layer in self._model.named_modules() if layer._parameters and name not in in_place
        }
        self._parameter_ids = {
            name: {key: id(p) for key, p in layer._parameters.items() if p is not None}
            for name, layer in self._owners.items()
        }
        self._written: set[int] = set()
        self._trace = self._new_trace() if self.delta.needs_record else None
        with self._context():
            begin_reload(self._reloaded)
        self._open = dict(self._owners)
        self._expected = {name: expected_numel(layer) for name, layer in self._open.items()}

    def _new_trace(self) -> LoadTrace:
        targets = self._hooks.targets(self._model) if self._hooks is not None else []
        in_place = {storage_of(loaded): (loaded, target) for loaded, target in targets}
        return LoadTrace(in_place, parameters_by_storage(self._owners))

    @torch.no_grad()
    def load(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.dtype | None]:
        """Load tensors that are views of shared memory. Views that a layer still buffers are copied.

        Returns:
            The tensors that the engine read: name -> dtype in which it holds the tensor, None if that is not known. A
            name that was read once is read by every later load, so only the first loads are watched.
        """
        tensors = list(named_tensors)
        self._held |= {name: None for name, tensor in tensors if name.endswith(_COMPUTED) or not tensor.numel()}
        trace = self._trace
        if trace is None and any(name not in self._held for name, _ in tensors):
            trace = LoadTrace({}, {})
        borrowed = {storage_of(tensor) for _, tensor in tensors}
        self.delta.keep(tensors)
        if trace is not None:
            trace.set_sources(tensors)
        with self._context(), self._watch, trace or nullcontext():
            load_weights(self._model, tensors)
        if trace is not None:
            trace.flush()
            for name, dtype in trace.held.items():
                self._held[name] = dtype or self._held.get(name)
        self._copy_borrowed(borrowed)
        return {name: self._held[name] for name, _ in tensors if name in self._held}

    def _copy_borrowed(self, borrowed: set[int]) -> None:
        """Replace views into `borrowed` storages that open layers buffer by copies, and close completed layers."""
        keep = self._trace.keep if self._trace is not None else torch.Tensor.clone
        for name in list(self._open):
            info = layer_info(self._open[name])
            if not awaits_weights(info):
                self._written.update(self._parameter_ids[name].values())
                del self._open[name]
                continue
            for _, arguments in info.loaded_weights:
                for key, value in arguments.arguments.items():
                    if not isinstance(value, torch.Tensor) or value.is_meta:
                        continue
                    if storage_of(value) in borrowed:
                        arguments.arguments[key] = keep(value)

    def unwritten(self) -> list[str]:
        """Return the engine names of parameters that this session has not written completely."""
        names = self._log.unwritten()
        for name, layer in self._open.items():
            if layer_info(layer).load_numel >= expected_numel(layer):
                self._written.update(self._parameter_ids[name].values())
        for name, layer in self._open.items():
            loaded = {key for key, _ in layer_info(layer).loaded_weights}
            for key, identity in self._parameter_ids[name].items():
                if identity in self._written or key in never_loaded():
                    continue
                part = " (in part)" if key in loaded else ""
                names.append(f"{name}.{key}{part}")
        return names

    @torch.no_grad()
    def finish(self) -> None:
        """Bring the remaining layers to the kernel layout, and compute again what is derived from a shared weight."""
        with self._context():
            tied = {name: layer for name, layer in self._open.items() if layer_info(layer).load_numel <= 0}
            if self._hooks is not None:
                self._hooks.finish(self._model)
            if self._trace is not None:
                # Padded layers are completed only now, from the weights that they buffered.
                self._trace.set_sources(())
            with self._trace or nullcontext():
                finish_reload(self._reloaded, self._vllm_config.model_config)
            derived = {name: compute for name, layer in tied.items() if (compute := post_processing(layer)) is not None}
            for compute in derived.values():
                compute()
        if self._hooks is not None:
            self._hooks.check_engine(self._model)  # the layers that vLLM reloaded too
        if self._trace is not None:
            self._trace.flush()
            self.delta.record(self._trace.map, self._owners, self._expected, tied, derived)
        self._trace, self._owners, self._open = None, {}, {}

    @contextmanager
    def _context(self) -> Iterator[None]:
        from vllm.config import set_current_vllm_config

        # On a CPU, tensors are created there anyway, and the device mode costs as much as many of the calls inside.
        device = nullcontext() if self._device.type == "cpu" else self._device
        with set_current_vllm_config(self._vllm_config), device:
            yield


def load_session(
    model: nn.Module, vllm_config: Any, device: torch.device, hooks: QuantizationScheme | None = None
) -> LayerwiseLoadSession:
    """Return the session that loads new weights into this engine.

    Raises:
        NotImplementedError: this vLLM release has no layer-wise reload.
    """
    try:
        import vllm.model_executor.model_loader.reload
    except ImportError as error:
        import vllm

        raise NotImplementedError(
            f"vLLM {vllm.__version__} has no layer-wise weight reload (vllm.model_executor.model_loader.reload): "
            "use vLLM 0.18 or newer"
        ) from error
    return LayerwiseLoadSession(model, vllm_config, device, hooks)
