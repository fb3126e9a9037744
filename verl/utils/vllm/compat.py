"""Where vLLM releases differ, and what the rollout needs from their insides.

Everything that reaches into vLLM for loading weights into a live engine is here: a new release is one file to read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Protocol

import torch
from torch import nn

from verl.utils.vllm.npu_vllm_patch import run_time_parameters_back
from verl.utils.vllm.write_log import WriteLog


class LayerHooks(Protocol):
    """Around loading: what a quantisation does to the layers that it keeps in a layout of its own."""

    def begin(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """Bring its layers into their load layout, and return them by name: they are loaded in place."""

    def finish(self, model: nn.Module) -> None:
        """Bring them into their run-time layout."""


class _Without:
    """A model as vLLM's reload walks it, some of its layers left out."""

    def __init__(self, model: nn.Module, left_out: Iterable[nn.Module]):
        left_out = {id(layer) for layer in left_out}
        self._layers = [layer for layer in model.modules() if id(layer) not in left_out]

    def modules(self) -> Iterator[nn.Module]:
        return iter(self._layers)


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
        hooks: of the quantisation, if any.
    """

    def __init__(self, model: nn.Module, vllm_config, device: torch.device, hooks: LayerHooks | None = None):
        self._model = model
        self._vllm_config = vllm_config
        self._device = device
        self._hooks = hooks

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
        self._reloaded = _Without(self._model, in_place.values()) if in_place else self._model
        # Parameters before the reload: afterwards the layers hold stand-ins on the meta device.
        self._owners = {
            name: layer for name, layer in self._model.named_modules() if layer._parameters and name not in in_place
        }
        self._parameter_ids = {
            name: {key: id(p) for key, p in layer._parameters.items() if p is not None}
            for name, layer in self._owners.items()
        }
        self._written: set[int] = set()
        with self._context():
            _forget_packed_experts(self._model)
            initialize_layerwise_reload(self._reloaded)
        self._open = dict(self._owners)

    @torch.no_grad()
    def load(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load views of shared memory: what a layer still waits with is copied, so that the memory may be reused."""
        tensors = list(named_tensors)
        borrowed = {tensor.untyped_storage().data_ptr() for _, tensor in tensors}
        with self._context(), self._watch:
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
                    if value.untyped_storage().data_ptr() in borrowed:
                        arguments.arguments[key] = value.clone()

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
            tied = [layer for layer in self._open.values() if _layer_info(layer).load_numel <= 0]
            if self._hooks is not None:
                self._hooks.finish(self._model)
            finalize_layerwise_reload(self._reloaded, self._vllm_config.model_config)
            for layer in tied:
                quant_method = getattr(layer, "quant_method", None)
                if quant_method is not None and any(p is not None for p in layer._parameters.values()):
                    quant_method.process_weights_after_loading(layer)
        self._owners, self._open = {}, {}

    @contextmanager
    def _context(self) -> Iterator[None]:
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self._vllm_config), self._device:
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


def _forget_packed_experts(model: nn.Module) -> None:
    """Make unquantised experts on a CPU pack their weights again.

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
    model: nn.Module, vllm_config, device: torch.device, hooks: LayerHooks | None = None
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


def openai_functions() -> tuple[Callable, Callable, Callable]:
    """vLLM's `build_app`, `init_app_state` and `make_arg_parser` of its OpenAI-compatible endpoint."""
    try:
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # before 0.31
        from vllm.entrypoints.openai.api_server import build_app, init_app_state
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    return build_app, init_app_state, make_arg_parser


def build_openai_app(model: str, tasks: tuple[str, ...], model_config, *, api_key: str):
    """The FastAPI application and the arguments it was built from; no engine is behind it yet."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    build_app, _, make_arg_parser = openai_functions()
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", model, "--disable-uvicorn-access-log"])
    arguments.api_key = [api_key]
    # vLLM 0.18 does not ask for the model's config.
    takes_config = "model_config" in inspect.signature(build_app).parameters
    return build_app(arguments, tasks, *([model_config] if takes_config else [])), arguments


async def openai_app(engine, model: str, *, api_key: str):
    """vLLM's FastAPI application in front of `engine`; requests to `/v1` need `Authorization: Bearer <api_key>`."""
    tasks = await engine.get_supported_tasks()
    app, arguments = build_openai_app(model, tasks, engine.model_config, api_key=api_key)
    _, init_app_state, _ = openai_functions()
    await init_app_state(engine, app.state, arguments, tasks)
    return app
