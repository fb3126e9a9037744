"""Derives a description from an unquantized checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from verl.utils.model_dir.index import CheckpointIndex, read_checkpoint_index
from verl.utils.quantization.ascend_description.description import AscendDescription, similar_name
from verl.utils.quantization.ascend_description.validation import validate_unquantized, validated_description
from verl.utils.quantization.ascend_layers import IGNORED, Layer, read_layers
from verl.utils.quantization.formats import W8A8_MXFP8


def build_description(
    model_dir: str | Path,
    *,
    tp_size: int = 1,
    ignore: Iterable[str] = (),
    scheme: str = W8A8_MXFP8,
    expert_parallel: bool = False,
    padded_shares: bool = False,
    index: CheckpointIndex | None = None,
) -> AscendDescription:
    """Describe a BF16 (or float32, float16) checkpoint with every projection of the decoder quantized.

    Args:
        model_dir: local Hugging Face directory.
        tp_size: tensor-parallel size of the rollout.
        ignore: modules to leave out: exact names (`model.layers.0.self_attn.q_proj`), or `re:` and a regular expression
            that must match the whole name.
        scheme: W8A8_MXFP8 or W4A8_MXFP, for every quantized layer.
        expert_parallel: each rank holds whole experts instead of a slice of each.
        padded_shares: accept shares of row-parallel layers that vllm-ascend 0.28 pads; see `validate_tensor_parallel`.
        index: the names and shapes of the checkpoint, if they were read already or derived from config.json.

    Raises:
        ValueError: the checkpoint is damaged or already quantized; an `ignore` that matches nothing; shards of a packed
            layer that are not alike; inputs of a row-parallel layer that blocks of 32 do not divide among the ranks;
            inputs of a W4A8_MXFP layer that are not a multiple of 64 on each rank.
    """
    index = index or read_checkpoint_index(model_dir)
    layers = [replace(layer, scheme=scheme) for layer in select_layers(index, ignore)]
    return validated_description(index, layers, tp_size, expert_parallel, padded_shares)


def select_layers(index: CheckpointIndex, ignore: Iterable[str] = ()) -> list[Layer]:
    """Return every weight of an unquantized checkpoint, the projections of the decoder marked as quantized.

    Args:
        ignore: projections to leave out, see `build_description`.

    Raises:
        ValueError: the checkpoint is damaged or already quantized; an `ignore` that matches nothing.
    """
    validate_unquantized(index)
    return _leave_out(read_layers(index), tuple(ignore))


def _leave_out(layers: Sequence[Layer], patterns: tuple[str, ...]) -> list[Layer]:
    """Mark the layers that a pattern of `ignore` matches as unquantized."""
    names = {layer.name for layer in layers}
    left_out: set[str] = set()
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                regex = re.compile(pattern.removeprefix("re:"))
            except re.error as error:
                raise ValueError(f"ignore {pattern!r}: not a regular expression: {error}; correct it") from error
            found = {name for name in names if regex.fullmatch(name)}
        else:
            found = {pattern.removesuffix(".weight")} & names
        if not found:
            raise ValueError(
                f"ignore {pattern!r}: matches no layer of the checkpoint{similar_name(pattern, names)}; give the full "
                "name of a module, or 're:' and a regular expression for the whole name"
            )
        left_out |= found
    return [replace(la, reason=IGNORED) if la.quantized and la.name in left_out else la for la in layers]
