"""Fields of a model's config.json that other code computes with: their kinds, and bounds that no model exceeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Smallest and largest value of whole numbers; a list holds one number for each layer.
_NUMBERS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer"), (1, 10_000)),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads"), (1, 2**16)),
    **dict.fromkeys(("hidden_size", "n_embd"), (1, 2**20)),
    "head_dim": (1, 2**16),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), (1, 2**24)),
    "vocab_size": (1, 2**27),
    "max_position_embeddings": (1, 2**31),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"), (0, 2**16)),
}
# Without them there is no model.
_NOT_NULL = ("num_hidden_layers", "n_layer", "hidden_size", "n_embd", "num_attention_heads", "n_head", "vocab_size")
_KINDS: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("model_type", "torch_dtype"), (str, "text")),
    "tie_word_embeddings": (bool, "true or false"),
    **dict.fromkeys(
        ("rope_scaling", "rope_parameters", "quantization_config", "text_config", "auto_map"), (dict, "an object")
    ),
}
_LISTS_OF_TEXT = ("architectures", "layer_types")
_MAX_SHOWN = 80


def config_problem(config: Mapping[str, Any]) -> str | None:
    """Return the first field of a config.json, or of its text part, whose value no model has; None without one."""
    parts = {"": config}
    if isinstance(config.get("text_config"), Mapping):
        parts["text_config."] = config["text_config"]
    for prefix, part in parts.items():
        for name, value in part.items():
            if (expected := _expected(name, value)) is not None:
                shown = repr(value)
                shown = shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."
                return f"{prefix}{name}={shown}: must be {expected}; correct it"
    return None


def _expected(name: str, value: Any) -> str | None:
    """Return what a field must be; None if it is, or is not known."""
    if name in _NUMBERS and not (value is None and name not in _NOT_NULL):
        low, high = _NUMBERS[name]
        numbers = value if isinstance(value, list) and value else [value]
        if not all(type(number) is int and low <= number <= high for number in numbers):
            return f"a whole number from {low} to {high}"
    if value is None:
        return None
    if name in _KINDS and not isinstance(value, _KINDS[name][0]):
        return _KINDS[name][1]
    if name in _LISTS_OF_TEXT and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        return "a list of text"
    return None
