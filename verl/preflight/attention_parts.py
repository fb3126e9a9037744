"""Parts of a model's attention that backends of transformers ignore, by the fields of its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from verl.utils.hf_config import ATTENTION_BACKEND

_EAGER = "eager"


def soft_cap(config: Mapping[str, Any]) -> float | None:
    """Return the value at which attention scores are capped, or None."""
    default = 50.0 if config.get("model_type") == "gemma2" else None
    cap: float | None = config.get("attn_logit_softcapping", default)
    return cap


def has_alibi(config: Mapping[str, Any]) -> bool:
    """Return True if the attention adds ALiBi biases."""
    named = config.get("alibi") or config.get("position_embedding_type") == "alibi"
    return bool(named) or config.get("model_type") in ("bloom", "mpt")


def sink_fields(config: Mapping[str, Any]) -> list[str]:
    """Return the fields that turn on attention sinks."""
    fields = [name for name, value in config.items() if "sink" in name and value]
    return [*fields, "model_type"] if config.get("model_type") == "gpt_oss" else fields


def uses_eager_attention(config: Mapping[str, Any]) -> bool:
    """Return True if the trainer computes attention scores one by one, as `choose_attention` decides by comparison."""
    backend = config.get(ATTENTION_BACKEND)
    if backend is not None:
        return bool(backend == _EAGER)
    return soft_cap(config) is not None or has_alibi(config) or bool(sink_fields(config))
