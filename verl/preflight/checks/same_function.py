"""Checks that trainer and engine compute the same function of a model's weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from verl.preflight.attention_parts import has_alibi, sink_fields
from verl.preflight.findings import Findings
from verl.utils.hf_config import ATTENTION_BACKEND, COMPARED_BACKENDS
from verl.utils.model_dir.model_files import ModelFiles

# Probabilities and amplitudes that transformers applies in train mode only: dropout, skipped layers, noise on routers.
_TRAIN_MODE = re.compile(r"dropout|pdrop|layerdrop|drop_path|drop_rate|jitter")
# Parts of an attention that backends may ignore.
_ATTENTION = re.compile(r"softcap|sliding_window|sink|attention_chunk_size|attn_temperature")
_ROPE_KEYS = ("rope_scaling", "rope_parameters")


def check_train_mode(section: str, override: dict[str, Any], files: ModelFiles, found: Findings) -> None:
    """Check that `override_config` sets no dropout or noise, and note those of config.json, which do not act.

    Args:
        files: the model without `override`.
    """
    found.errors += [
        f"{section}.override_config.{name}={value}: not supported, because updates compute the same function of the "
        "weights as the engine; leave it out"
        for name, value in _train_mode_fields(override)
    ]
    given = [f"{name}={value}" for name, value in _train_mode_fields(files.config) if name not in override]
    if given:
        found.notes.append(
            f"{section}.path={files.path}: {', '.join(given)} of its config.json have no effect, because updates "
            "compute the same function of the weights as the engine"
        )


def _train_mode_fields(config: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted((name, value) for name, value in config.items() if _TRAIN_MODE.search(name) and value)


def check_attention(section: str, files: ModelFiles, found: Findings) -> None:
    """Check an attention backend that is not compared with eager attention, because it does not run on a CPU.

    Flash attention 2 drops attention sinks (`_process_flash_attention_kwargs` in transformers'
    `modeling_flash_attention_utils.py`), and no such backend has an argument for ALiBi.

    Args:
        files: the model with `override_config`.
    """
    config = files.config
    backend = config.get(ATTENTION_BACKEND)
    if backend is None or backend in COMPARED_BACKENDS:
        return
    field = f"{section}.override_config.attn_implementation={backend}"
    alibi, sinks = has_alibi(config), sink_fields(config)
    if alibi:
        found.errors.append(f"{field}: it ignores the ALiBi biases of {files.path}; leave it out, or use eager")
    if sinks and "flash_attention_2" in str(backend):
        found.errors.append(
            f"{field}: it ignores the attention sinks of {files.path} ({', '.join(sinks)} in its config.json); leave "
            "it out, or use eager"
        )
    elif not alibi:
        special = [f"{name}={value}" for name, value in config.items() if value and _ATTENTION.search(name)]
        of_model = f" ({', '.join(special)} in its config.json)" if special else ""
        found.warnings.append(
            f"{field}: it does not run on a CPU, so it is not compared with eager attention before the start. Whether "
            f"it computes all of the attention of {files.path}{of_model}, only trainer.check_consistency tells"
        )


def check_rope(section: str, files: ModelFiles, length: int, found: Findings) -> None:
    """Check that transformers and vLLM scale the model's rotary embeddings alike.

    Args:
        files: the model with `override_config`.
        length: limit of a sequence in the engine, in tokens.
    """
    positions, kind = files.number("max_position_embeddings"), str(files.config.get("model_type"))
    for key, rope in rope_sections(files):
        field = f"{section}.path={files.path}: {key}"
        if rope_type(rope) == "longrope":
            found.errors += [f"{field}.{text}" for text in _longrope_problems(rope, files, positions)]
        elif rope_type(rope) == "dynamic":
            found.errors += [f"{field}.{text}" for text in _dynamic_problems(rope, positions, kind)]


def check_sliding_window(section: str, files: ModelFiles, length: int, found: Findings) -> None:
    """Check that transformers and vLLM let a token attend to the same tokens.

    vLLM gives Cohere's models a window of one token more (`commandr.py`, `cohere2_moe.py`).

    Args:
        length: limit of a sequence in the engine, in tokens.
    """
    kind, window = str(files.config.get("model_type")), files.number("sliding_window")
    if kind in ("cohere2", "cohere2_moe") and window is not None and length > window:
        found.errors.append(
            f"{section}.path={files.path}: sliding_window={window}: vLLM's {kind} attends to one token more than "
            f"transformers', which counts for max_model_len={length}; lower data.max_prompt_length + "
            f"data.max_response_length and rollout.max_model_len to at most {window}"
        )


def rope_sections(files: ModelFiles) -> Iterator[tuple[str, dict[str, Any]]]:
    """Iterate over name and value of the rope parameters in config.json; some models have one set per kind of layer."""
    for key in _ROPE_KEYS:
        value = files.config.get(key)
        if isinstance(value, dict):
            yield key, value
            yield from ((f"{key}.{name}", part) for name, part in value.items() if isinstance(part, dict))


def rope_type(rope: dict[str, Any]) -> str:
    """Return the type of rope parameters, in old and new spelling."""
    name = str(rope.get("rope_type", rope.get("type", "default")))
    return "longrope" if name == "su" else name


def _longrope_problems(rope: dict[str, Any], files: ModelFiles, positions: int | None) -> Iterator[str]:
    original = rope.get("original_max_position_embeddings", files.config.get("original_max_position_embeddings"))
    if not isinstance(original, int) or positions is None:
        return
    factor = positions / original
    scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    for name, expected in (("factor", factor), ("attention_factor", scale)):
        value = rope.get(name)
        if isinstance(value, int | float) and not math.isclose(value, expected, rel_tol=1e-3):
            yield (
                f"{name}={value}: vLLM ignores it and uses {expected:.6g}, from max_position_embeddings and "
                "original_max_position_embeddings; remove it"
            )
    for name in ("short_mscale", "long_mscale"):
        value = rope.get(name)
        if isinstance(value, int | float) and not math.isclose(value, scale, rel_tol=1e-3):
            yield f"{name}={value}: transformers ignores it and uses {scale:.6g}; remove it"


def _dynamic_problems(rope: dict[str, Any], positions: int | None, kind: str) -> Iterator[str]:
    trained = rope.get("max_trained_positions")
    if trained is not None and trained != positions:
        yield f"max_trained_positions={trained}: vLLM uses it, but transformers does not; remove it"
    if rope.get("alpha") and not kind.startswith("hunyuan"):
        yield f"alpha={rope['alpha']}: vLLM uses it, but transformers does not for {kind}; remove it"
