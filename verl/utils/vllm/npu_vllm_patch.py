"""Patches of vLLM and vllm-ascend that are needed to accept new weights at run time on an NPU.

Each patch states its releases and its reason. `apply_patches` runs in every process of an engine, through verl's vLLM
plugin. It applies each patch once; a patch that a release no longer needs is skipped with a log line. Required settings
are in `npu_settings`.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from verl.utils.quantization.formats import MX_BLOCK_SIZE, W8A8_MXFP8
from verl.utils.vllm.layerwise import awaits_weights, layer_info
from verl.utils.vllm.replace_method import replace_method
from verl.utils.vllm.vllm_fp8_utils import record_kernel_layout

logger = logging.getLogger(__name__)

_TRANSPOSED, _KERNEL_PARAMETERS = "_verl_transposed", "_verl_kernel_parameters"


@dataclass(frozen=True)
class Patch:
    """One change of vLLM's or vllm-ascend's code.

    Attributes:
        name: name in the log.
        releases: releases that need it.
        why: the fault without it.
        apply: makes the change. Returns None, or the reason why the patch does not apply; ImportError counts as such a
            reason.
    """

    name: str
    releases: str
    why: str
    apply: Callable[[], str | None]


def apply_patches(patches: tuple[Patch, ...] | None = None) -> list[str]:
    """Apply the applicable patches, each once per process. Return the names of the newly applied ones."""
    applied = []
    for patch in PATCHES if patches is None else patches:
        try:
            obstacle = patch.apply()
        except ImportError as error:
            obstacle = str(error)
        if obstacle is None:
            logger.info("patched %s (%s): %s", patch.name, patch.releases, patch.why)
            applied.append(patch.name)
        else:
            logger.info("skipped the patch of %s (for %s): %s", patch.name, patch.releases, obstacle)
    return applied


# ---- rotary embedding ----


def rotary_init(apply_rotary_emb: type) -> Callable[..., None]:
    """Return an `__init__` for vLLM's `ApplyRotaryEmb` that does not look for flash-attention.

    `enforce_enable` is passed by keyword, and only if the base class accepts it: `CustomOp.__init__` of vLLM 0.18 to
    0.32 accepts keywords only, other releases accept nothing.
    """

    def __init__(
        self: Any, enforce_enable: bool = False, is_neox_style: bool = True, enable_fp32_compute: bool = False
    ) -> None:
        base_init = super(apply_rotary_emb, self).__init__  # type: ignore[arg-type]  # `self` is one, set as __init__ later
        parameters = inspect.signature(base_init).parameters.values()
        accepts = any(p.name == "enforce_enable" or p.kind is p.VAR_KEYWORD for p in parameters)
        base_init(**({"enforce_enable": enforce_enable} if accepts else {}))
        self.is_neox_style = is_neox_style
        self.enable_fp32_compute = enable_fp32_compute
        self.apply_rotary_emb_flash_attn = None

    return __init__


def _patch_rotary() -> str | None:
    common = import_module("vllm.model_executor.layers.rotary_embedding.common")
    # vLLM 0.26 tries to import the kernel and handles a missing one.
    if not hasattr(common, "find_spec"):
        return "this vLLM checks for flash-attention's kernel, not only for the package"
    return replace_method(common.ApplyRotaryEmb, "__init__", lambda _: rotary_init(common.ApplyRotaryEmb))


# ---- unquantized experts ----


def recording_transposition(process: Callable) -> Callable:
    """Wrap `process_weights_after_loading` of vllm-ascend's unquantized experts, which transposes their weights.

    The method creates new parameters. The wrapper copies vLLM's attributes to them, above all `weight_loader`, and
    marks them. The layer also keeps a reference, because waking up replaces them again (`restore_expert_parameters`).
    """

    @functools.wraps(process)
    def wrapper(self: Any, layer: Any) -> None:
        before = {name: layer._parameters[name] for name in ("w13_weight", "w2_weight")}
        process(self, layer)
        for name, old in before.items():
            new = layer._parameters.get(name)
            if new is None:
                continue
            for key, value in vars(old).items():
                if key not in vars(new):
                    setattr(new, key, value)
            setattr(new, _TRANSPOSED, True)
        # During a reload the layer's parameters are temporary.
        if _KERNEL_PARAMETERS not in layer.__dict__:
            layer.__dict__[_KERNEL_PARAMETERS] = {name: layer._parameters[name] for name in before}

    return wrapper


def restore_expert_parameters(model: Any) -> None:
    """Undo the effect of `wake_up` on unquantized experts (vllm-ascend 0.18, and 0.23 without quantization).

    `wake_up` creates new parameters, transposed and without loaders. The original ones, which the engine uses, have the
    same memory.
    """
    for layer in model.modules():
        for name, parameter in layer.__dict__.get(_KERNEL_PARAMETERS, {}).items():
            if layer._parameters.get(name) is not parameter:
                layer._parameters[name] = parameter


def loading_transposed(load: Callable) -> Callable:
    """Wrap `FusedMoE.weight_loader`: a parameter marked as transposed is first transposed back, in place and once."""

    @functools.wraps(load)
    def wrapper(self: Any, param: Any, *arguments: Any, **options: Any) -> Any:
        if getattr(param, _TRANSPOSED, False):
            param.data = param.data.transpose(1, 2)
            setattr(param, _TRANSPOSED, False)
        return load(self, param, *arguments, **options)

    return wrapper


def _patch_experts() -> str | None:
    fused_moe = getattr(import_module("vllm.model_executor.layers.fused_moe"), "FusedMoE", None)
    if not isinstance(fused_moe, type):
        return "in this vLLM FusedMoE is not a class: RoutedExperts loads the experts"
    ascend = import_module("vllm_ascend.ops.fused_moe.fused_moe").AscendUnquantizedFusedMoEMethod
    obstacle = replace_method(ascend, "process_weights_after_loading", recording_transposition)
    return obstacle or replace_method(fused_moe, "weight_loader", loading_transposed)


# ---- MXFP8 layouts ----


def recording_layout(process: Callable, keys: tuple[str, ...]) -> Callable:
    """Wrap a scheme's `process_weights_after_loading` so that a layer records the shapes of its checkpoint layout.

    Args:
        keys: names of its weights; their scales have the suffix `_scale`.
    """
    names = [name for key in keys for name in (key, f"{key}_scale")]

    @functools.wraps(process)
    def wrapper(self: Any, layer: Any) -> None:
        if getattr(layer, "_mxfp8_transformed", False):
            return
        shapes = {name: tuple(getattr(layer, name).shape) for name in names}
        for key in keys:
            _check_no_group_is_lost(_name(layer), key, shapes)
        process(self, layer)
        record_kernel_layout(layer, shapes)

    return wrapper


def _name(layer: Any) -> str:
    """Return a layer's name in its model. Linear layers and experts store it in different attributes."""
    return getattr(layer, "prefix", "") or getattr(layer, "layer_name", "") or type(layer).__name__


def _check_no_group_is_lost(name: str, key: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise if a group of scales would be lost.

    Layers of this release have K // 32 scales per row, in pairs: a row-parallel layer would drop the last one silently.
    """
    k, groups = shapes[key][-1], shapes[f"{key}_scale"][-1]
    if k % (2 * MX_BLOCK_SIZE):
        # No release pads the scales of experts.
        newer = "use vllm-ascend 0.23.0 or newer, or " if key == "weight" else ""
        raise ValueError(
            f"{name}.{key} has {k} inputs on this rank; this vllm-ascend holds {groups} scales for them and "
            f"supports only multiples of {2 * MX_BLOCK_SIZE} inputs: {newer}leave the layer out "
            "(actor_rollout_ref.rollout.quantization_config_file)"
        )


def _patch_layouts() -> str | None:
    # The modules of the schemes have other names from 0.27 on; this registry is in all releases.
    scheme_class = import_module("vllm_ascend.quantization.methods").get_scheme_class
    linear, experts = scheme_class(W8A8_MXFP8, "linear"), scheme_class(W8A8_MXFP8, "moe")
    if hasattr(linear, "restore_weights_for_rl_loading"):
        return "this release records layouts itself"
    name = "process_weights_after_loading"
    obstacle = replace_method(linear, name, lambda process: recording_layout(process, ("weight",)))
    return obstacle or replace_method(
        experts, name, lambda process: recording_layout(process, ("w13_weight", "w2_weight"))
    )


# ---- MXFP8 layers in vLLM's layer-wise reload ----


def processing_reloaded(process: Callable, keys: tuple[str, ...]) -> Callable:
    """Wrap a scheme's `process_weights_after_loading` so that it also processes weights of vLLM's layer-wise reload.

    The method skips a layer with the mark `_mxfp8_transformed`. vLLM's reload gives the layer new parameters in
    checkpoint layout and leaves the mark, so the checkpoint layout would be copied into the kernel layout: an error, or
    for a square weight wrong values. The wrapper removes the mark during a reload. The method then writes into the
    buffers of the first load, which the reload copies onto themselves: addresses stay.

    Args:
        keys: names of its weights; their scales have the suffix `_scale`.

    Raises (the wrapper):
        ValueError: the update has not all values and scales of the layer in MXFP8; nothing could quantize them here.
    """
    names = [name for key in keys for name in (key, f"{key}_scale")]

    @functools.wraps(process)
    def wrapper(self: Any, layer: Any) -> None:
        info = layer_info(layer)
        reloaded = awaits_weights(info) and info.kernel_tensors is not None
        if not (reloaded and getattr(layer, "_mxfp8_transformed", False)):
            process(self, layer)
            return
        _check_reloaded(layer, info, names)
        layer._mxfp8_transformed = False
        try:
            process(self, layer)
        finally:
            # After an error the layer gets its former tensors back, which have the kernel layout.
            layer._mxfp8_transformed = True

    return wrapper


def _check_reloaded(layer: Any, info: Any, names: list[str]) -> None:
    """Raise if vLLM's reload has not received all values and scales of a layer, in their own dtypes."""
    cure = (
        "vLLM's layer-wise reload does not quantize: send values (float8_e4m3fn) and scales (uint8, `<name>_scale`) of "
        'every weight, or use weight_transfer_config.backend="verl" with quantization_side=receiver'
    )
    dtypes: dict[str, set[Any]] = {name: set() for name in names}
    for name, arguments in info.loaded_weights:
        tensors = (value for key, value in arguments.arguments.items() if key != "param" and hasattr(value, "dtype"))
        dtypes.setdefault(name, set()).update(tensor.dtype for tensor in tensors)
    for name in names:
        expected = getattr(layer, name).dtype
        if dtypes[name] != {expected}:
            received = ", ".join(sorted(map(str, dtypes[name]))) or "nothing"
            raise ValueError(f"{_name(layer)}.{name}: received {received}, expected {expected}; {cure}")
    # Padding is no part of a checkpoint. The padding of these layers is added later, by the method itself.
    if info.load_numel < info.load_numel_total:
        raise ValueError(
            f"{_name(layer)}: received {info.load_numel} of {info.load_numel_total} elements of its weights, so a "
            f"projection or an expert is missing; {cure}"
        )


def with_vllm_config(method: Callable) -> Callable:
    """Wrap a method of a weight transfer engine that processes layers, so that vLLM's configuration is the current one.

    Quantized layers read it. vLLM's worker sets it around these calls, vllm-ascend's does not.
    """

    @functools.wraps(method)
    def wrapper(self: Any, *arguments: Any) -> None:
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.vllm_config):
            method(self, *arguments)

    return wrapper


def refusing_layers(start: Callable, marks: tuple[str, ...]) -> Callable:
    """Wrap `start_weight_update` of a weight transfer that cannot update layers with one of the marks."""

    @functools.wraps(start)
    def wrapper(self: Any) -> None:
        for name, layer in self.model.named_modules():
            if any(hasattr(layer, mark) for mark in marks):
                raise NotImplementedError(
                    f"{name}: {type(self).__name__} of this vllm-ascend does not update layers of this format "
                    '(docs/weight_transfer.md); use weight_transfer_config.backend="verl"'
                )
        start(self)

    return wrapper


def _patch_reload() -> str | None:
    transfers = [
        import_module("vllm_ascend.distributed.weight_transfer.hccl_engine").HCCLWeightTransferEngine,
        import_module("vllm_ascend.distributed.weight_transfer.npu_ipc_engine").NPUIPCWeightTransferEngine,
    ]
    if list(inspect.signature(transfers[0].receive_weights).parameters) != ["self", "update_info"]:
        return "in this release the worker runs the reload, not the weight transfer: read its code first"
    scheme_class = import_module("vllm_ascend.quantization.methods").get_scheme_class
    keys = {"linear": ("weight",), "moe": ("w13_weight", "w2_weight")}
    for kind, names in keys.items():
        wrap = functools.partial(processing_reloaded, keys=names)
        obstacle = replace_method(scheme_class(W8A8_MXFP8, kind), "process_weights_after_loading", wrap)
        if obstacle is not None:
            return obstacle
    for transfer in transfers:
        replace_method(transfer, "receive_weights", with_vllm_config)
        replace_method(transfer, "finish_weight_update", with_vllm_config)
        # npu_ipc of 0.28 does not run the reload: it loads into the kernel layout.
        reloads = "initialize_layerwise_reload" in transfer.start_weight_update.__code__.co_names
        # The reload does not update MXFP4 weights for the same reason, and they get new addresses.
        marks = ("_mxfp4_transformed",) if reloads else ("_mxfp4_transformed", "_mxfp8_transformed")
        replace_method(transfer, "start_weight_update", functools.partial(refusing_layers, marks=marks))
    return None


PATCHES = (
    Patch(
        "ApplyRotaryEmb",
        "vLLM 0.13 to 0.25",
        "it imports flash-attention's Triton kernel if the package is installed, even if the kernel cannot run",
        _patch_rotary,
    ),
    Patch(
        "FusedMoE.weight_loader",
        "vLLM before 0.24",
        "vllm-ascend keeps experts transposed and without a loader, so new weights do not fit",
        _patch_experts,
    ),
    Patch(
        "MXFP8 layouts",
        "vllm-ascend 0.18",
        "its layers do not record their checkpoint layout, so it cannot be restored",
        _patch_layouts,
    ),
    Patch(
        "MXFP8 layers in vLLM's layer-wise reload",
        "vllm-ascend 0.27.1 to 0.30",
        "its weight transfer (hccl, npu_ipc) leaves MXFP8 layers marked as transformed, so new weights are not",
        _patch_reload,
    ),
)
