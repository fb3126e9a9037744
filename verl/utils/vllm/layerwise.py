"""vLLM's layer-wise reload: the functions of it that verl uses, their differences between releases, and repairs.

The reload brings each layer back to the checkpoint layout, runs its post-processing again once all its weights have
been loaded, and copies the result into the tensors that the engine runs on, so that their addresses never change.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import nn

# vLLM counts these as never loaded. Their loaders write into the parameter that kernels read.
_LOADED_IN_PLACE = {"e_score_correction_bias"}


# Attribute with the weight that `fp8_cpu` dequantized.
DEQUANTIZED_WEIGHT = "_dequantized_weight"


class LayerSubset:
    """Some layers of a model, in the form that vLLM's reload walks: it keeps a flag on the model itself."""

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
        self._model._do_torchao_reload = value  # type: ignore[assignment]  # nn.Module declares tensors and modules


def shared_layers() -> Iterator[nn.Module]:
    """Return the layers that vLLM shares between all models of a process, and that no checkpoint fills.

    These are rotary embeddings. A reload must leave them alone: while an update of one engine is open or was refused,
    an engine that starts in the same process would take the empty embeddings for weights to be filled.
    """
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT

    return (layer for layer in _ROPE_DICT.values() if next(layer.parameters(), None) is None)


def begin_reload(layers: LayerSubset) -> None:
    """Bring layers to the checkpoint layout."""
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

    _forget_packed_experts(layers)
    _restore_absorbed_projections(layers)
    initialize_layerwise_reload(layers)  # type: ignore[arg-type]  # a subset is enough: it walks modules()


def finish_reload(layers: LayerSubset, model_config: Any) -> None:
    """Bring layers to the kernel layout."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    finalize_layerwise_reload(layers, model_config)


def abandon_reload(model: nn.Module) -> None:
    """Close an unfinished reload: give layers their kernel tensors back, and drop the weights that they buffer."""
    from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors

    for layer in model.modules():
        info = layer_info(layer)
        if awaits_weights(info):
            if info.kernel_tensors is not None:
                _place_kernel_tensors(layer, info)
            info.reset()


def load_weights(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Load checkpoint tensors through the model's own loaders.

    Raises:
        ValueError: a loader failed; the message names the parameter.
    """
    drawn: list[str] = []

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            drawn.append(f"{name!r} {list(tensor.shape)}")
            yield name, tensor

    try:
        cast(Any, model).load_weights(stream())
    except (AssertionError, RuntimeError, ValueError, KeyError) as error:
        # Loaders draw one tensor after the other, and most of their assertions have no text.
        raise ValueError(f"parameter {drawn[-1]}: {type(error).__name__}: {error}") from error


def layer_info(layer: nn.Module) -> Any:
    """Return vLLM's reload state of a layer."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    return get_layerwise_info(layer)


def awaits_weights(info: Any) -> bool:
    """Return whether a layer waits for weights; vLLM 0.18 names the method `can_process`."""
    return info.can_load() if hasattr(info, "can_load") else info.can_process()


def never_loaded() -> set[str]:
    """Return the names of parameters that no checkpoint fills."""
    from vllm.model_executor.model_loader.reload import meta

    # Before vLLM 0.32 the same set also names what never leaves the device.
    return getattr(meta, "SKIP_LOAD_TENSORS", meta.SKIP_TENSORS)


def loaded_in_place(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that the reload leaves on the device although a checkpoint fills them, by engine name."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] in _LOADED_IN_PLACE & never_loaded()
    }


def expected_numel(layer: nn.Module) -> int:
    """Return the elements that a checkpoint writes into the layer's own parameters, without padding and buffers."""
    total = 0
    for key, parameter in layer._parameters.items():
        if parameter is None or key in never_loaded():
            continue
        rows = getattr(getattr(layer, "shard_indices", None), "num_org_elements", None)
        if rows is not None and parameter.ndim:
            # A vocabulary is padded to a multiple of 64 rows, which no checkpoint fills.
            total += rows * parameter[0].numel()
        else:
            total += getattr(parameter, "weight_loader_numel", parameter.numel())
    return total


def post_processing(layer: nn.Module) -> Callable[[], None] | None:
    """Return the function that computes what a layer keeps beside its parameters; None if there is none."""
    quant_method = getattr(layer, "quant_method", None)
    if quant_method is None or all(parameter is None for parameter in layer._parameters.values()):
        return None
    return functools.partial(quant_method.process_weights_after_loading, layer)


def keeps_derived_copy(model: nn.Module, layer: nn.Module) -> bool:
    """Return whether a layer multiplies with a copy of its weight: packed by vLLM, or dequantized by `fp8_cpu`.

    An embedding table is only looked up.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    heads = {id(head) for module in model.modules() if (head := getattr(module, "lm_head", None)) is not None}
    table = isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead)
    copied = hasattr(layer, "cpu_linear") or hasattr(layer, DEQUANTIZED_WEIGHT)
    return copied and (not table or id(layer) in heads)


def _forget_packed_experts(layers: LayerSubset) -> None:
    """Make unquantized experts on a CPU pack their weights again.

    Their method takes an existing kernel as a sign that copying the weights is enough (vLLM 0.32). That holds for
    layouts that a copy preserves, not for the CPU's packed one.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for layer in layers.modules():
        quant_method: Any = getattr(layer, "quant_method", None)
        if getattr(quant_method, "moe_kernel", None) is not None:
            quant_method.moe_kernel = None


def absorbed_projections(model: nn.Module | LayerSubset) -> list[nn.Module]:
    """Return the projections that multi-head latent attention multiplies into others when weights are processed."""
    found = (getattr(layer, "kv_b_proj", None) for layer in model.modules())
    return [layer for layer in found if layer is not None]


def _restore_absorbed_projections(layers: LayerSubset) -> None:
    """Allocate the weights that attention has freed after it had absorbed them, as on a CPU with AMX (vLLM 0.32).

    The reload copies new weights into them before the attention absorbs and frees them again.
    """
    from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor

    for projection in absorbed_projections(layers):
        info = layer_info(projection)
        for name, loaded in info.restore_metadata[0].items():
            parameter = projection._parameters.get(name)
            if parameter is not None and not parameter.numel():
                with info.restore_device:
                    projection.register_parameter(name, cast(nn.Parameter, materialize_meta_tensor(loaded)))
