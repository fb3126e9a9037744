"""Checks of `actor_rollout_ref.model`: files, lengths and tensor parallelism. lora.py checks the keys of LoRA."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from typing import Any

from verl.config.ppo import PPOConfig
from verl.preflight.batch_sizes import longest_sample
from verl.preflight.checks.chat_template import check_chat_template
from verl.preflight.checks.expert_parallel import check_expert_parallel
from verl.preflight.checks.same_function import (
    check_attention,
    check_rope,
    check_sliding_window,
    check_train_mode,
    rope_sections,
    rope_type,
)
from verl.preflight.checks.sequence_parallel import check_shared_sequences
from verl.preflight.checks.tensor_parallel import check_divided_layers
from verl.preflight.checks.token_ids import check_token_ids
from verl.preflight.findings import Findings
from verl.preflight.target import Target
from verl.utils.model_dir.errors import ModelFilesError
from verl.utils.model_dir.index import has_weights
from verl.utils.model_dir.model_files import (
    ModelFiles,
    is_config_alone,
    model_of_config,
    read_config_alone,
    read_model,
    with_overrides,
)
from verl.utils.model_dir.public_models import public_config
from verl.utils.model_dir.weight_shapes import contradiction

_MODEL = "actor_rollout_ref.model"
_PATH = f"{_MODEL}.path"
_ROLLOUT = "actor_rollout_ref.rollout"
# Fields of a config.json that trainer and engine do not read from `override_config`.
_DTYPES = "set dtype and model_dtype in fsdp_config, and actor_rollout_ref.rollout.dtype"
_SET_BY_OTHER_KEYS = {
    "dtype": _DTYPES,
    "torch_dtype": _DTYPES,
    "quantization_config": "set actor_rollout_ref.rollout.quantization",
    "architectures": "use a checkpoint of that architecture",
    "model_type": "use a checkpoint of that architecture",
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# Endings of the vocabularies of less usual tokenizers, most of which bring their own Python code.
_OTHER_VOCABULARIES = (".model", ".tiktoken", ".spm", ".vocab", ".bpe", ".v3", ".v7", "tekken.json")


def check_model(config: PPOConfig, target: Target, found: Findings) -> ModelFiles | None:
    """Check the policy's model and return its files; None if they are missing or damaged."""
    model = config.actor_rollout_ref.model
    if model.path is None:
        return None  # `value_problems` reports it
    files = find_model(_PATH, model.path, target, found)
    if files is None:
        return None
    check_architecture(_PATH, files, model.trust_remote_code, found)
    _check_tokenizer(model.path, model.tokenizer_path, target, found)
    tokenizer_field = f"{_MODEL}.tokenizer_path" if model.tokenizer_path else _PATH
    check_chat_template(tokenizer_field, model.tokenizer_path or model.path, found)
    check_override(_MODEL, model.override_config, files, found)
    check_train_mode(_MODEL, model.override_config, files, found)
    files = with_overrides(files, model.override_config)
    check_token_ids(_PATH, files, model.tokenizer_path or model.path, found)
    check_attention(_MODEL, files, found)
    check_shared_sequences(config, _MODEL, files, found)
    check_divided_layers(config, files, found)
    check_rope(_MODEL, files, config.max_model_len, found)
    check_sliding_window(_MODEL, files, config.max_model_len, found)
    _check_max_model_len(config, found)
    _check_positions(config, files, found)
    _check_heads(config, files, found)
    check_expert_parallel(_ROLLOUT, config.actor_rollout_ref.rollout, files, found)
    return files


def find_model(field: str, path: str, target: Target, found: Findings) -> ModelFiles | None:
    """Read a model from the headers of its weights, or for a planned run from its config.json or its public name.

    Returns:
        None after an error.
    """
    public = None if os.path.exists(path) else public_config(path)
    try:
        if target.without_files and public is not None:
            found.notes.append(f"{field}={path}: not found, checked as the public model of this name")
            return model_of_config(path, public)
        if not target.starting and is_config_alone(path):
            found.notes.append(f"{field}={path}: has no weights, which a run needs; checked with its config.json")
            return read_config_alone(path)
        return read_model(path)
    except ModelFilesError as error:
        if os.path.exists(path):
            found.errors.append(f"{field}={path}: {error}")
            return None
        found.add_missing_file(f"{field}={path}: {error}")
        return model_of_config(path, {}) if target.without_files else None
    except OSError as error:
        found.errors.append(f"{field}={path}: cannot be read ({error.strerror}: {error.filename})")
        return None


# Model types whose new weights vLLM cannot load into a running engine, and why.
_NOT_RELOADED = {
    "gpt_oss": "loads its experts and attention sinks in one form and keeps them in another, so new weights cannot be "
    "loaded",
    "phi": "makes a new bias of the output head at each load, so the one in use would keep its old values",
    "phimoe": "loads its attention under other names than transformers gives it, so it would never be updated",
}


# Public names of models for images, video or sound.
MULTI_MODAL_NAME = re.compile(
    r"(VL|Omni|MiniCPM-[oV]|GLM-\d(\.\d)?V|LLaVA|Pixtral|Qwen3\.5|Llama-4)(?![a-z])", re.IGNORECASE
)


def _is_in_transformers(files: ModelFiles) -> bool:
    """Return True if the installed transformers has the model type, without importing it, which takes seconds."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return True
    kind = str(files.config.get("model_type")).replace("-", "_")
    return os.path.isdir(os.path.join(os.path.dirname(spec.origin), "models", kind))


def check_architecture(field: str, files: ModelFiles, trust_remote_code: bool, found: Findings) -> None:
    """Refuse models that start and then fail, or that would lose a part of themselves.

    Args:
        field: the key that names the model.
        trust_remote_code: code that comes with the model may run.
    """
    towers = [name for name in ("vision_config", "audio_config") if name in files.whole_config]
    if towers:
        found.errors.append(
            f"{field}={files.path}: is a multi-modal model ({', '.join(towers)} in its config.json), which is not "
            "supported; use a text-only checkpoint"
        )
    elif not files.whole_config and MULTI_MODAL_NAME.search(files.path.name):
        found.errors.append(
            f"{field}={files.path}: has the name of a multi-modal model, which is not supported; use a text-only model"
        )
    elif "auto_map" in files.whole_config and not trust_remote_code and not _is_in_transformers(files):
        found.errors.append(
            f"{field}={files.path}: transformers has no model type {files.config.get('model_type')}, whose code comes "
            f"with the model; set {field.removesuffix('path')}trust_remote_code=True"
        )
    elif (kind := files.config.get("model_type")) in _NOT_RELOADED:
        found.errors.append(
            f"{field}={files.path}: {kind} is not supported, because vLLM {_NOT_RELOADED[kind]}; use another model"
        )


def check_latent_attention(field: str, files: ModelFiles, device: str, found: Findings) -> None:
    """Refuse multi-head latent attention on a CPU, where vLLM 0.32 fails or computes something else (docs/models.md).

    Args:
        field: the key that names the model.
        device: `cpu`, `cuda` or `npu`.
    """
    if device == "cpu" and files.number("kv_lora_rank") is not None:
        found.errors.append(
            f"{field}={files.path}: vLLM's multi-head latent attention (kv_lora_rank in its config.json) does not work "
            "on a CPU; train it on an NPU or GPU, or use another model"
        )


def _check_tokenizer(model_path: str, tokenizer_path: str | None, target: Target, found: Findings) -> None:
    folder = tokenizer_path or model_path
    if has_tokenizer(folder):
        return
    field = f"{_MODEL}.tokenizer_path" if tokenizer_path else _PATH
    text = (
        f"{field}={folder}: no tokenizer found (none of {', '.join(TOKENIZER_FILES)}); copy one into this directory, "
        f"or set {_MODEL}.tokenizer_path"
    )
    if target.without_files and not os.path.exists(folder):
        return  # `find_model` reports the missing directory
    if not target.starting and is_config_alone(folder):
        found.warnings.append(f"{text}; prompts are not measured without it")
    else:
        found.errors.append(text)


def has_tokenizer(folder: str) -> bool:
    """Return True if a directory has one of the `TOKENIZER_FILES`, or another vocabulary with its settings."""
    if any(os.path.isfile(os.path.join(folder, name)) for name in TOKENIZER_FILES):
        return True
    if not os.path.isfile(os.path.join(folder, "tokenizer_config.json")):
        return False
    # os.path, because the methods of Path and of directory entries raise for a link to itself.
    others = (name for name in os.listdir(folder) if name.endswith(_OTHER_VOCABULARIES))
    return any(os.path.isfile(os.path.join(folder, name)) for name in others)


def check_override(section: str, override: dict[str, Any], files: ModelFiles, found: Findings) -> None:
    """Check that `override_config` contradicts no weights, and changes no fields that other keys set."""
    wanted, rows = override.get("vocab_size"), files.number("vocab_size")
    if wanted is not None and rows is not None and wanted != rows:
        found.errors.append(
            f"{section}.override_config.vocab_size={wanted}: the embeddings of the checkpoint in {files.path} have "
            f"{rows} rows; leave it out"
        )
    elif has_weights(files.path) and (problem := contradiction({**files.config, **override}, files.shapes)) is not None:
        found.errors.append(f"{section}.override_config: {problem} of {files.path}; leave the field out")
    for name, use in _SET_BY_OTHER_KEYS.items():
        if name in override:
            found.errors.append(f"{section}.override_config.{name}={override[name]}: not supported; {use}")


def _check_max_model_len(config: PPOConfig, found: Findings) -> None:
    limit, longest = config.actor_rollout_ref.rollout.max_model_len, longest_sample(config)
    if limit is not None and limit < longest:
        found.errors.append(
            f"actor_rollout_ref.rollout.max_model_len={limit}: must be at least {_length_keys(config)} = {longest} "
            "tokens; raise it, or lower one of these"
        )


def _check_positions(config: PPOConfig, files: ModelFiles, found: Findings) -> None:
    limit, longest = config.actor_rollout_ref.rollout.max_model_len, longest_sample(config)
    positions = max_positions(files)
    wanted = max(longest, limit or 0)
    if positions is not None and wanted > positions:
        if wanted == longest:
            subject, lower = _length_keys(config), "their sum"
        else:
            subject, lower = f"actor_rollout_ref.rollout.max_model_len={limit}", "it"
        found.errors.append(
            f"{subject}: {wanted} tokens, but the model has {positions} positions; lower {lower} to at most {positions}"
        )


def _length_keys(config: PPOConfig) -> str:
    data = config.data
    return f"data.max_prompt_length={data.max_prompt_length} + data.max_response_length={data.max_response_length}"


def max_positions(files: ModelFiles) -> int | None:
    """Return the maximum length of a sequence in tokens; None if it is not known.

    Scaled rotary embeddings reach further than `max_position_embeddings`, so their limit is not known. The type
    `dynamic` does not: vLLM's table of it ends there.
    """
    if any("factor" in rope and rope_type(rope) != "dynamic" for _, rope in rope_sections(files)):
        return None
    return files.number("max_position_embeddings", "n_positions")


def _check_heads(config: PPOConfig, files: ModelFiles, found: Findings) -> None:
    size = config.actor_rollout_ref.rollout.tensor_model_parallel_size
    heads, kv_heads = files.heads, files.kv_heads
    if heads is None or kv_heads is None:
        return

    def fits(tp: int) -> bool:
        # With fewer key-value heads than devices, vLLM copies heads. One number must then divide the other.
        return heads % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0)

    if not fits(size):
        sizes = ", ".join(str(tp) for tp in range(1, heads + 1) if fits(tp))
        found.errors.append(
            f"actor_rollout_ref.rollout.tensor_model_parallel_size={size}: cannot split the model's {heads} attention "
            f"heads and {kv_heads} key-value heads evenly; use one of {sizes}"
        )
