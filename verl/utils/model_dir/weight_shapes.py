"""Sizes in a config.json that contradict the shapes of the weights beside it.

With such a pair transformers trains a part of the model, or starts missing weights with random values, and says so only
in its log.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Field, the tensors whose shape has it, and its axis.
_SIZES = (
    ("hidden_size", re.compile(r"model\.embed_tokens\.weight"), 1),
    ("hidden_size", re.compile(r"model\.norm\.weight"), 0),
    ("vocab_size", re.compile(r"(model\.embed_tokens|lm_head)\.weight"), 0),
    ("intermediate_size", re.compile(r"model\.layers\.\d+\.mlp\.(gate|up)_proj\.weight"), 0),
    ("intermediate_size", re.compile(r"model\.layers\.\d+\.mlp\.down_proj\.weight"), 1),
)
_LAYER = re.compile(r"(?:model|transformer|gpt_neox)\.(?:layers|h)\.(\d+)\.")
# Numbers of further layers that predict tokens further ahead; the checkpoint has them behind the others.
_EXTRA_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")


def contradiction(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return the first size of a config that no weight has: field, both values and a tensor; None without one.

    Args:
        config: config.json, of a multi-modal model its part for the text. Other forms of weights, such as packed ones,
            are not checked.
        shapes: shapes of the weights by name.
    """
    if config.get("quantization_config"):
        return None
    for field, pattern, axis in _SIZES:
        value = config.get(field)
        found = {shape[axis]: name for name, shape in shapes.items() if pattern.fullmatch(name) and axis < len(shape)}
        # Layers of some models have other widths; one layer as in the config is enough.
        if type(value) is int and found and value not in found:
            size, name = next(iter(found.items()))
            return f"{field}={value}, but {name} has the shape {list(shapes[name])}, which needs {field}={size}"
    return _layer_contradiction(config, shapes)


def _layer_contradiction(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    field = next((name for name in ("num_hidden_layers", "n_layer") if type(config.get(name)) is int), None)
    numbers = {int(match[1]): name for name in shapes if (match := _LAYER.match(name)) is not None}
    if field is None or not numbers:
        return None
    count, wanted = max(numbers) + 1, config[field]
    extra = max(config[name] if type(config.get(name)) is int else 0 for name in _EXTRA_LAYERS)
    if wanted <= count <= wanted + extra:
        return None
    return f"{field}={wanted}, but the weights have {count} layers, the last one with {numbers[count - 1]}"
