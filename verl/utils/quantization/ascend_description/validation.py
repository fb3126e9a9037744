"""Checks of a description before an engine starts with it."""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from verl.utils.model_dir.index import CheckpointIndex
from verl.utils.quantization.ascend_description.description import AscendDescription
from verl.utils.quantization.ascend_layers import NEVER, ROW, Layer, name_pattern
from verl.utils.quantization.formats import ASCEND_SCHEMES, FLOAT, MX_BLOCK_SIZE, W4A8_MXFP

FIELD = "actor_rollout_ref.rollout.quantization_config_file"
SCHEME_FIELD = "actor_rollout_ref.rollout.quantization_scheme"
# vllm-ascend stores the scales of two groups of MXFP4 weights next to each other, and pads none.
_MXFP4_INPUTS = 2 * MX_BLOCK_SIZE
# Models whose checkpoint packs two projections that vLLM's `packed_modules_mapping` of the model names separately.
_LOOKS_UP_PARTS = ("glm", "glm4")
# Models that vLLM packs without a `packed_modules_mapping`: the description would need entries that no checkpoint has.
_PACKED_WITHOUT_MAPPING = ("gptj", "orion", "stablelm")
_FLOATING = {"F64", "F32", "F16", "BF16"}
_QUANTIZED_SUFFIXES = (".weight_scale", ".weight_scale_inv", ".weight_packed", ".qweight", ".weight_offset")


def validated_description(
    index: CheckpointIndex, layers: Sequence[Layer], tp_size: int, expert_parallel: bool, padded_shares: bool
) -> AscendDescription:
    """Return the description of these layers.

    Args:
        padded_shares: see `validate_tensor_parallel`.

    Raises:
        ValueError: see `build_description`.
    """
    if tp_size < 1:
        raise ValueError(f"tensor_model_parallel_size={tp_size}: must be 1 or more")
    _validate_packed_layers(layers)
    _validate_packed_names(index, layers)
    validate_inputs(layers, tp_size, expert_parallel=expert_parallel, padded_shares=padded_shares)
    description = AscendDescription(str(index.model_dir), tp_size, tuple(layers), dict(index.tensors))
    if not description.quantized_layers:
        raise ValueError(
            f"{index.model_dir}: no layer is left to quantize; leave out fewer, or set actor_rollout_ref.rollout."
            "quantization=null"
        )
    return description


def _validate_packed_names(index: CheckpointIndex, layers: Sequence[Layer]) -> None:
    """Reject tensors that the engine looks up under other names: those of their parts, or of the whole."""
    kind = index.config.get("model_type")
    if kind in _PACKED_WITHOUT_MAPPING:
        raise ValueError(
            f"{index.model_dir}: vLLM's {kind} packs projections without naming their parts, so no description fits; "
            "not supported with quantization=ascend: set actor_rollout_ref.rollout.quantization=fp8 or null"
        )
    packed = next((layer.name for layer in layers if layer.name.endswith(".mlp.gate_up_proj")), None)
    if kind in _LOOKS_UP_PARTS and packed is not None:
        raise ValueError(
            f"{index.model_dir}: {packed} is one tensor, but vLLM's {kind} asks the description for gate_proj and "
            "up_proj; not supported with quantization=ascend: set actor_rollout_ref.rollout.quantization=fp8 or null"
        )


def validate_unquantized(index: CheckpointIndex) -> None:
    """Reject a checkpoint whose config, names or dtypes show that it is quantized already."""
    configs = {id(config): config for config in (index.config, index.text_config)}.values()
    given = next((c[key] for c in configs for key in ("quantization_config", "compression_config") if c.get(key)), None)
    method = given.get("quant_method", "unnamed method") if isinstance(given, dict) else given
    evidence = f"config.json has a quantization_config ({method})" if given is not None else ""
    for name, info in index.tensors.items():
        if evidence:
            break
        if name.endswith(_QUANTIZED_SUFFIXES) or (name.endswith(".weight") and info.dtype not in _FLOATING):
            evidence = f"{name} is {info.dtype}"
    if evidence:
        raise ValueError(
            f"{index.model_dir}: the checkpoint is already quantized: {evidence}; quantization=ascend quantizes while "
            "it sends weights and needs the BF16 checkpoint"
        )


def validate_name_prefixes(entries: Mapping[str, Any], release: str) -> None:
    """Reject names that vllm-ascend before 0.27 confuses.

    It (`is_layer_skipped_ascend`) skips a layer as soon as the name of a FLOAT entry *starts with* the layer's name.

    Args:
        entries: the fields of a description.
        release: version of vllm-ascend, for the message.
    """
    floats = sorted(key for key, kind in entries.items() if key.endswith(".weight") and kind == FLOAT)
    for name, kind in entries.items():
        if not name.endswith(".weight") or kind not in ASCEND_SCHEMES:
            continue
        prefix = name.removesuffix(".weight")
        position = bisect.bisect_left(floats, prefix)
        if position < len(floats) and floats[position].startswith(prefix):
            other = floats[position].removesuffix(".weight")
            raise ValueError(
                f"{prefix} is quantized and {other} is not: the second name starts with the first, so vllm-ascend "
                f"{release} would confuse them and leave both unquantized; quantize both or neither, or use "
                "vllm-ascend 0.28.0rc1 or newer"
            )


def _validate_packed_layers(layers: Sequence[Layer]) -> None:
    """Check that the shards of each packed layer have the same scheme or are all unquantized."""
    packed: dict[str, list[Layer]] = {}
    for layer in layers:
        # Without a fused first projection, `q_a_proj` is alone in its list, and a list of one is never mixed.
        if layer.packed_with and layer.reason not in NEVER:
            packed.setdefault(layer.packed_with, []).append(layer)
    for name, shards in packed.items():
        unquantized = [layer.name for layer in shards if not layer.quantized]
        if unquantized and len(unquantized) < len(shards):
            quantized = next(layer.name for layer in shards if layer.quantized)
            raise ValueError(
                f"{name}: the engine packs these {len(shards)} layers into one, and they must be alike: {quantized} "
                f"is quantized, {unquantized[0]} is not ({len(unquantized)} such); leave out all of them or none"
            )
        other = next((layer for layer in shards if layer.described_as != shards[0].described_as), None)
        if other is not None:
            raise ValueError(
                f"{name}: the engine packs these {len(shards)} layers into one, and they must be alike: "
                f"{shards[0].name} is {shards[0].scheme}, {other.name} is {other.scheme}; give them one value in "
                f"{FIELD}"
            )


def validate_experts(layers: Iterable[Layer]) -> None:
    """Check that the experts of quantized layers are in separate tensors; NotImplementedError names one that is not."""
    for layer in layers:
        if layer.quantized and len(layer.info.shape) == 3:
            # The order of gate and up in such a tensor differs by model.
            raise NotImplementedError(
                f"{layer.name} {list(layer.info.shape)}: experts in one tensor are not supported yet in a "
                "quantized rollout; use a checkpoint with one tensor per expert, or leave the layer out"
            )


def validate_inputs(
    layers: Sequence[Layer], tp_size: int, *, expert_parallel: bool = False, padded_shares: bool
) -> None:
    """Check that the engine can hold each rank's share of the inputs of quantized layers.

    Args:
        padded_shares: see `validate_tensor_parallel`.

    Raises:
        ValueError: layers that do not fit, and what to do.
    """
    validate_tensor_parallel(layers, tp_size, expert_parallel=expert_parallel, padded_shares=padded_shares)
    _validate_mxfp4_inputs(layers, tp_size, expert_parallel)


def _validate_mxfp4_inputs(layers: Sequence[Layer], tp_size: int, expert_parallel: bool) -> None:
    """Check that each W4A8_MXFP layer has a multiple of 64 inputs on a rank.

    vllm-ascend has no scales for a partial group, and an odd number of groups fails while it loads weights.
    """
    for layer in layers:
        if layer.described_as != W4A8_MXFP:
            continue
        # It is not known how a layer of an unknown kind is cut.
        cut = layer.split in (ROW, "") and not (layer.experts and expert_parallel)
        ranks = tp_size if cut else 1
        if layer.k % (_MXFP4_INPUTS * ranks):
            sizes = [str(size) for size in range(1, ranks) if layer.k % (_MXFP4_INPUTS * size) == 0]
            smaller = f"use tensor_model_parallel_size={' or '.join(sizes)}, or " if sizes else ""
            raise ValueError(
                f"{layer.name} {list(layer.info.shape)} has {layer.k / ranks:g} inputs on a rank "
                f"(tensor_model_parallel_size={tp_size}), and {W4A8_MXFP} takes multiples of {_MXFP4_INPUTS} only: "
                f"{smaller}give it another value in the file that `verl describe --scheme {W4A8_MXFP}` writes, and use "
                f"that file as {FIELD}"
            )


def _fits_ranks(layer: Layer, tp_size: int, padded_shares: bool) -> bool:
    """Return whether the engine can hold each rank's share of a row-parallel layer's inputs."""
    if layer.k % (MX_BLOCK_SIZE * tp_size) == 0:
        return True
    if not padded_shares or layer.experts or layer.k % tp_size:
        return False
    # vllm-ascend holds as many scales as the share has whole and partial blocks from its own start. A share that begins
    # inside a block of the checkpoint can touch one block more.
    share = layer.k // tp_size
    held = -(-share // MX_BLOCK_SIZE)
    return all(-(-(rank * share % MX_BLOCK_SIZE + share) // MX_BLOCK_SIZE) == held for rank in range(tp_size))


def validate_tensor_parallel(
    layers: Sequence[Layer], tp_size: int, *, expert_parallel: bool = False, padded_shares: bool
) -> None:
    """Check that the engine can hold each rank's share of the inputs of row-parallel layers.

    Args:
        padded_shares: the engine pads a share that begins or ends inside a block (vllm-ascend 0.28, not for experts);
            otherwise tensor parallelism must cut at the end of a block.

    Raises:
        ValueError: layers that do not fit: their inputs on one rank, and what to do.
    """
    by_pattern: dict[str, list[Layer]] = {}
    for layer in layers:
        cut = layer.split == ROW and not (layer.experts and expert_parallel)
        if layer.quantized and cut and tp_size > 1 and not _fits_ranks(layer, tp_size, padded_shares):
            by_pattern.setdefault(name_pattern(layer.name), []).append(layer)
    if not by_pattern:
        return
    faults = []
    for pattern, group in by_pattern.items():
        first = group[0]
        sizes = [size for size in range(1, tp_size) if size == 1 or _fits_ranks(first, size, padded_shares)]
        # A layer's experts are quantized together, so they are left out together.
        glob = f"{name_pattern(first.experts)}.**" if first.experts else pattern
        regex = re.escape(glob).replace(r"\*\*", ".*").replace(r"\*", r"\d+")
        whole = f" or expert_parallel_size={tp_size}" if first.experts and first.k % MX_BLOCK_SIZE == 0 else ""
        faults.append(
            f"{first.name} {list(first.info.shape)} ({len(group)} such) has {first.k} inputs, {first.k / tp_size:g} "
            f"per rank: use tensor_model_parallel_size={' or '.join(map(str, sizes))}{whole}, or leave it out: "
            f"{json.dumps({'ignore': ['re:' + regex]})} in {FIELD}"
        )
    raise ValueError(
        f"tensor_model_parallel_size={tp_size}: cuts the inputs of row-parallel layers inside a block of "
        f"{MX_BLOCK_SIZE}: {'; '.join(faults)}"
    )
