"""The model directory: whole, and fit for the lengths and the parallelism asked for."""

from __future__ import annotations

import os
from typing import Any

from verl.config.ppo import PPOConfig
from verl.preflight.findings import Findings
from verl.preflight.target import Scope
from verl.utils.model_dir.model_files import (
    ModelFiles,
    ModelFilesError,
    is_config_alone,
    model_of_config,
    read_config_alone,
    read_model,
)
from verl.utils.model_dir.public_models import public_config

_PATH = "actor_rollout_ref.model.path"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def check_model(config: PPOConfig, scope: Scope, found: Findings) -> ModelFiles | None:
    """What the model's files say, or None where they are missing or damaged."""
    model = config.actor_rollout_ref.model
    if model.path is None:
        return None  # reported as not set
    files = find_model(_PATH, model.path, scope, found)
    if files is None:
        return None
    _check_tokenizer(config, scope, found)
    check_vocabulary("actor_rollout_ref.model", model.override_config, files, found)
    _check_lengths(config, files, found)
    _check_heads(config, files, found)
    return files


def find_model(field: str, path: str, scope: Scope, found: Findings) -> ModelFiles | None:
    """The model in a directory, by its weights' headers; where no run starts, by its config or its name alone.

    Returns:
        None where an error was found.
    """
    public = None if os.path.exists(path) else public_config(path)
    try:
        if scope.without_files and public is not None:
            found.notes.append(f"{field}={path}: not here; judged as the public model of that name")
            return model_of_config(path, public)
        if not scope.starting and is_config_alone(path):
            found.notes.append(f"{field}={path}: has no weights, which a run needs; judged by its config.json")
            return read_config_alone(path)
        return read_model(path)
    except ModelFilesError as error:
        if os.path.exists(path):
            found.errors.append(f"{field}={path}: {error}")
            return None
        found.missing(f"{field}={path}: {error}")
        return model_of_config(path, {}) if scope.without_files else None
    except OSError as error:
        found.errors.append(f"{field}={path}: cannot be read ({error.strerror}: {error.filename})")
        return None


def _check_tokenizer(config: PPOConfig, scope: Scope, found: Findings) -> None:
    model = config.actor_rollout_ref.model
    folder = model.tokenizer_path or model.path or ""
    if has_tokenizer(folder):
        return
    field = f"actor_rollout_ref.model.tokenizer_path={folder}" if model.tokenizer_path else f"{_PATH}={folder}"
    text = (
        f"{field}: no tokenizer there (none of {', '.join(TOKENIZER_FILES)}); copy it there, or set "
        "actor_rollout_ref.model.tokenizer_path"
    )
    if scope.without_files and not os.path.exists(folder):
        return  # said of the model
    if not scope.starting and is_config_alone(folder):
        found.warnings.append(f"{text}; prompts are not measured without it")
    else:
        found.errors.append(text)


def has_tokenizer(folder: str) -> bool:
    """Whether a directory has one of the `TOKENIZER_FILES`."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in TOKENIZER_FILES)


def check_vocabulary(section: str, override: dict[str, Any], files: ModelFiles, found: Findings) -> None:
    """`override_config` cannot give a checkpoint other rows than it has."""
    wanted, have = override.get("vocab_size"), files.number("vocab_size")
    if wanted is not None and have is not None and wanted != have:
        found.errors.append(
            f"{section}.override_config.vocab_size={wanted}: the checkpoint in {files.path} has {have} rows in its "
            "embeddings; leave it out"
        )


def _check_lengths(config: PPOConfig, files: ModelFiles, found: Findings) -> None:
    data, rollout = config.data, config.actor_rollout_ref.rollout
    longest = data.max_prompt_length + data.max_response_length
    caps = f"data.max_prompt_length={data.max_prompt_length} + data.max_response_length={data.max_response_length}"
    if rollout.max_model_len is not None and rollout.max_model_len < longest:
        found.errors.append(
            f"actor_rollout_ref.rollout.max_model_len={rollout.max_model_len}: below {caps} = {longest} tokens; use at "
            f"least {longest}, or lower one of the caps"
        )
    positions = files.number("max_position_embeddings", "n_positions")
    override = config.actor_rollout_ref.model.override_config.get("max_position_embeddings")
    if isinstance(override, int):
        positions = override
    wanted = max(longest, rollout.max_model_len or 0)
    # Scaled rotary embeddings reach further than the number in the config.
    if positions is not None and wanted > positions and not scales_positions(files):
        what = caps if wanted == longest else f"actor_rollout_ref.rollout.max_model_len={rollout.max_model_len}"
        lower = "their sum" if what == caps else "it"
        found.errors.append(
            f"{what}: {wanted} tokens, but the model has {positions} positions; lower {lower} to at most {positions}"
        )


def scales_positions(files: ModelFiles) -> bool:
    """Whether the model reaches further than the number of positions in its config."""
    scaling = files.config.get("rope_scaling") or files.config.get("rope_parameters") or {}
    return isinstance(scaling, dict) and "factor" in scaling


def _check_heads(config: PPOConfig, files: ModelFiles, found: Findings) -> None:
    size = config.actor_rollout_ref.rollout.tensor_model_parallel_size
    heads, kv_heads = files.heads, files.kv_heads
    if heads is None or kv_heads is None:
        return

    def fits(tp: int) -> bool:
        # Fewer key-value heads than devices are copied, which needs the one number to divide the other.
        return heads % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0)

    if not fits(size):
        sizes = ", ".join(str(tp) for tp in range(1, heads + 1) if fits(tp))
        found.errors.append(
            f"actor_rollout_ref.rollout.tensor_model_parallel_size={size}: the model has {heads} attention heads and "
            f"{kv_heads} key-value heads; use one of {sizes}"
        )
