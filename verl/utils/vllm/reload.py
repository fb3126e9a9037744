"""Where vLLM releases differ, and what the rollout needs from their insides.

Everything that reaches into vLLM for loading weights into a live engine is here: a new release is one file to read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from verl.utils.quantization_scheme import QuantizationScheme
from verl.utils.vllm.apply_delta import DeltaApplier
from verl.utils.vllm.layout_map import LayoutMap, LoadTrace, parameters_by_storage, storage_of
from verl.utils.vllm.npu_vllm_patch import run_time_parameters_back
from verl.utils.vllm.write_log import WriteLog


class _Some:
    """Some layers of a model, as vLLM's reload walks them, which keeps a flag on the model itself."""

    def __init__(self, model: nn.Module, layers: Iterable[nn.Module]):
        self._model = model
        self._layers = list(layers)

    def modules(self) -> Iterator[nn.Module]:
        return iter(self._layers)

    @property
    def _do_torchao_reload(self) -> bool:
        return getattr(self._model, "_do_torchao_reload", False)

    @_do_torchao_reload.setter
    def _do_torchao_reload(self, value: bool) -> None:
        self._model._do_torchao_reload = value


class LayerwiseLoadSession:
    """Loads checkpoint tensors into a running model through vLLM's layer-wise reload.

    The reload puts each layer back into its load layout, re-runs its post-processing once all its weights have come,
    and copies the result into the tensors the engine runs on, so their addresses never change. Three things it leaves
    to us: a tied output head keeps the GEMM it packed from the old weights; experts on a CPU are not packed again, so
    that plain weights are read as packed ones; and a layer that was loaded in part is not an error.

    Layers that `hooks` take care of are left out of the reload and written in place by their own loaders.

    Args:
        model: the engine's model.
        vllm_config: its `VllmConfig`.
        device: where its parameters live.
        hooks: of the quantization, if any.
    """

    def __init__(self, model: nn.Module, vllm_config, device: torch.device, hooks: QuantizationScheme | None = None):
        self._model = model
        self._vllm_config = vllm_config
        self._device = device
        self._hooks = hooks
        self._patcher: DeltaApplier | None = None
        self._trace: LoadTrace | None = None

    def begin(self) -> None:
        """Put every layer back into its load layout."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        _roll_back(self._model)
        run_time_parameters_back(self._model)
        in_place = self._hooks.begin(self._model) if self._hooks is not None else {}
        self._log = WriteLog(
            {
                f"{name}.{key}": parameter
                for name, layer in in_place.items()
                for key, parameter in layer._parameters.items()
                if parameter is not None and key not in _never_loaded()
            }
        )
        self._watch = self._log if in_place else nullcontext()
        left_out = {id(layer) for layer in in_place.values()}
        self._reloaded = _Some(self._model, (layer for layer in self._model.modules() if id(layer) not in left_out))
        # Parameters before the reload: afterwards the layers hold stand-ins on the meta device.
        self._owners = {
            name: layer for name, layer in self._model.named_modules() if layer._parameters and name not in in_place
        }
        self._parameter_ids = {
            name: {key: id(p) for key, p in layer._parameters.items() if p is not None}
            for name, layer in self._owners.items()
        }
        self._written: set[int] = set()
        self._trace = self._new_trace() if self._patcher is None else None
        with self._context():
            _forget_packed_experts(self._reloaded)
            initialize_layerwise_reload(self._reloaded)
        self._open = dict(self._owners)
        self._expected = {name: _expected_numel(layer) for name, layer in self._open.items()}

    def _new_trace(self) -> LoadTrace:
        own_layout = self._hooks.targets(self._model) if self._hooks is not None else []
        loaded = {storage_of(loaded): (loaded, target) for loaded, target in own_layout}
        return LoadTrace(loaded, parameters_by_storage(self._owners))

    @torch.no_grad()
    def load(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load views of shared memory: what a layer still waits with is copied, so that the memory may be reused."""
        tensors = list(named_tensors)
        borrowed = {storage_of(tensor) for _, tensor in tensors}
        if self._patcher is not None:
            self._patcher.keep(tensors)
        if self._trace is not None:
            self._trace.bring(tensors)
        with self._context(), self._watch, self._trace or nullcontext():
            self._load(tensors)
        self._settle(borrowed)

    def _load(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        drawn: list[str] = []

        def stream() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in tensors:
                drawn.append(f"{name!r} {list(tensor.shape)}")
                yield name, tensor

        try:
            self._model.load_weights(stream())
        except (AssertionError, RuntimeError, ValueError, KeyError) as error:
            # Loaders draw one tensor after the other, and most of their assertions say nothing.
            raise ValueError(f"parameter {drawn[-1]}: {type(error).__name__}: {error}") from error

    def _settle(self, borrowed: set[int]) -> None:
        if self._trace is not None:
            self._trace.settle()
        keep = self._trace.keep if self._trace is not None else torch.Tensor.clone
        for name in list(self._open):
            info = _layer_info(self._open[name])
            if not _is_open(info):
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
        """Names of parameters (engine names) that hold less than a whole new value."""
        names = self._log.unwritten()
        for name, layer in self._open.items():
            info = _layer_info(layer)
            expected = _expected_numel(layer)
            if info.load_numel >= expected:
                self._written.update(self._parameter_ids[name].values())
        for name, layer in self._open.items():
            loaded = {key for key, _ in _layer_info(layer).loaded_weights}
            for key, identity in self._parameter_ids[name].items():
                if identity in self._written or key in _never_loaded():
                    continue
                part = " (in part)" if key in loaded else ""
                names.append(f"{name}.{key}{part}")
        return names

    @torch.no_grad()
    def finish(self) -> None:
        """Bring what is left to the run-time layout, and rebuild what was derived from a shared weight."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        with self._context():
            tied = {name: layer for name, layer in self._open.items() if _layer_info(layer).load_numel <= 0}
            if self._hooks is not None:
                self._hooks.finish(self._model)
            if self._trace is not None:
                self._trace.bring(())  # what layers waited with: padded ones are only made now
            with self._trace or nullcontext():
                finalize_layerwise_reload(self._reloaded, self._vllm_config.model_config)
            derived = {name: make for name, layer in tied.items() if (make := _processing(layer)) is not None}
            for make in derived.values():
                make()
        if self._trace is not None:
            self._trace.settle()
            self._patcher = self._new_patcher(self._trace.map, tied, derived)
        self._trace, self._owners, self._open = None, {}, {}

    def _new_patcher(
        self, layout: LayoutMap, tied: Mapping[str, nn.Module], derived: Mapping[str, Callable[[], None]]
    ) -> DeltaApplier:
        filled: dict[str, int] = {}
        for name, count in layout.filled().items():
            layer = name.rpartition(".")[0]
            filled[layer] = filled.get(layer, 0) + count
        reloaded = {
            name: layer
            for name, layer in self._owners.items()
            if name not in tied and filled.get(name, 0) < self._expected[name]
        }
        # On a CPU a product's weight is packed next to the parameter, where that is kept.
        packed = {
            name: make
            for name, layer in self._owners.items()
            if name not in reloaded and _is_packed(self._model, layer) and (make := _processing(layer)) is not None
        }
        return DeltaApplier(
            self._model,
            layout,
            reloaded=reloaded,
            derived={**derived, **packed},
            refresh=lambda places: self._hooks.refresh(self._model, places) if self._hooks is not None else None,
            reload=self._reload_some,
        )

    # ---- patches, instead of a load ----

    @property
    def accepts_delta(self) -> bool:
        """Whether single elements can be changed: a whole load was watched, and what has to be kept is kept."""
        return self._patcher is not None and self._patcher.complete

    def begin_delta(self) -> None:
        """Before the first `patch`.

        Raises:
            RuntimeError: nothing was recorded, or an engine's parameter is not where it was: load everything.
        """
        run_time_parameters_back(self._model)
        if self._hooks is not None:
            self._hooks.begin_delta(self._model)
        if not self.accepts_delta:
            raise RuntimeError("no load of this engine was recorded yet: changes alone cannot be placed")
        assert self._patcher is not None
        moved = self._patcher.moved()
        if moved is not None:
            self._patcher = None
            raise RuntimeError(f"{moved} is not in the memory it was loaded into: changes alone cannot be placed")

    def patch(self, name: str, places: torch.Tensor | None, start: int, values: torch.Tensor) -> None:
        """Change elements of a checkpoint tensor; see `DeltaApplier.patch`."""
        assert self._patcher is not None
        self._patcher.patch(name, places, start, values)

    def refresh_derived(self) -> None:
        """After some of them: make anew what is derived from what changed, while the next ones are on their way."""
        assert self._patcher is not None
        with self._context():
            self._patcher.settle()

    def finish_delta(self) -> None:
        """After the last `patch`."""
        assert self._patcher is not None
        with self._context():
            self._patcher.finish()

    def _reload_some(self, layers: Mapping[str, nn.Module], tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        some = _Some(self._model, layers.values())
        _forget_packed_experts(some)
        initialize_layerwise_reload(some)
        self._load(list(tensors))
        finalize_layerwise_reload(some, self._vllm_config.model_config)

    @contextmanager
    def _context(self) -> Iterator[None]:
        from vllm.config import set_current_vllm_config

        # On a CPU tensors are made there anyway, and the device's mode costs as much as many of the calls inside.
        device = nullcontext() if self._device.type == "cpu" else self._device
        with set_current_vllm_config(self._vllm_config), device:
            yield


def _roll_back(model: nn.Module) -> None:
    """Close a reload that was given up: layers get their run-time tensors back, what they had buffered is dropped."""
    from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors

    for layer in model.modules():
        info = _layer_info(layer)
        if _is_open(info):
            if info.kernel_tensors is not None:
                _place_kernel_tensors(layer, info)
            info.reset()


def _processing(layer: nn.Module) -> Callable[[], None] | None:
    """What makes anew what a layer keeps beside its parameters, if anything."""
    quant_method = getattr(layer, "quant_method", None)
    if quant_method is None or all(parameter is None for parameter in layer._parameters.values()):
        return None
    return functools.partial(quant_method.process_weights_after_loading, layer)


def _is_packed(model: nn.Module, layer: nn.Module) -> bool:
    """Whether a product is computed from a packed copy of a layer's weight; a table of embeddings is only looked up."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    heads = {id(head) for module in model.modules() if (head := getattr(module, "lm_head", None)) is not None}
    table = isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead)
    return hasattr(layer, "cpu_linear") and (not table or id(layer) in heads)


def _forget_packed_experts(model: nn.Module | _Some) -> None:
    """Make unquantized experts on a CPU pack their weights again.

    Their method takes an existing kernel as a sign that weights need no more than copying (vLLM 0.32), which holds for
    layouts that a copy preserves, not for the CPU's packed one.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for layer in model.modules():
        if getattr(getattr(layer, "quant_method", None), "moe_kernel", None) is not None:
            layer.quant_method.moe_kernel = None


def _layer_info(layer: nn.Module):
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    return get_layerwise_info(layer)


def _is_open(info) -> bool:
    """Whether a layer waits for weights; vLLM 0.18 calls it `can_process`."""
    return info.can_load() if hasattr(info, "can_load") else info.can_process()


def _never_loaded() -> set[str]:
    from vllm.model_executor.model_loader.reload import meta

    # Before vLLM 0.32 the same set says what never leaves the device.
    return getattr(meta, "SKIP_LOAD_TENSORS", meta.SKIP_TENSORS)


def _expected_numel(layer: nn.Module) -> int:
    """Elements a whole checkpoint writes into this layer's own parameters, padding and buffers left out."""
    total = 0
    for key, parameter in layer._parameters.items():
        if parameter is None or key in _never_loaded():
            continue
        rows = getattr(getattr(layer, "shard_indices", None), "num_org_elements", None)
        if rows is not None and parameter.ndim:
            # A vocabulary is padded up to a multiple of 64 rows, which no checkpoint fills.
            total += rows * parameter[0].numel()
        else:
            total += getattr(parameter, "weight_loader_numel", parameter.numel())
    return total


def load_session(
    model: nn.Module, vllm_config, device: torch.device, hooks: QuantizationScheme | None = None
) -> LayerwiseLoadSession:
    """The way this vLLM takes new weights while it runs.

    Raises:
        NotImplementedError: a release without the layer-wise reload.
    """
    try:
        import vllm.model_executor.model_loader.reload
    except ImportError as error:
        import vllm

        raise NotImplementedError(
            f"vLLM {vllm.__version__} has no layer-wise weight reload (vllm.model_executor.model_loader.reload): "
            "use a release that has it, 0.18 or newer"
        ) from error
    return LayerwiseLoadSession(model, vllm_config, device, hooks)
