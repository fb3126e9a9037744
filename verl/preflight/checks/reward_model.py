"""Checks of `reward.reward_model`: its model, its devices, and who asks it."""

from __future__ import annotations

import os
from pathlib import Path

from verl.config import names
from verl.config.engine_pools import EnginePool, reward_model_pool
from verl.config.ppo import PPOConfig
from verl.preflight.batch_sizes import longest_sample
from verl.preflight.checks.engine_pools import check_pool
from verl.preflight.checks.model import TOKENIZER_FILES, has_tokenizer, max_positions
from verl.preflight.estimate import ServedModels
from verl.preflight.findings import Findings
from verl.preflight.light_tokenizer import read_template
from verl.preflight.target import Target
from verl.utils.model_dir.model_files import ModelFiles
from verl.utils.model_dir.model_kind import architecture, label_count, model_kind

_MODEL = "reward.reward_model"
_FUNCTION = "reward.custom_reward_function.path"


def check_reward_model(config: PPOConfig, target: Target, found: Findings) -> ServedModels:
    """Check the section, and return the reward model; empty without one, or if its files are missing or damaged."""
    pool = reward_model_pool(config)
    if pool is None:
        return []
    if not config.reward.reward_model.enable_resource_pool:
        found.errors.append(
            f"{_MODEL}.enable_resource_pool=False with {_MODEL}.enable=True: a reward model on the trainer's devices "
            f"is not supported; use {_MODEL}.enable_resource_pool=True, with its devices in {_MODEL}.nnodes and "
            f"{_MODEL}.n_gpus_per_node"
        )
        return []
    files = check_pool(pool, target, found)
    if files is None:
        return []
    _check_positions(pool, files, found)
    if files.whole_config:
        _check_kind(config, pool, files, found)
        _check_tokenizer(config, pool, target, found)
    return [(pool, files)]


def _check_positions(pool: EnginePool, files: ModelFiles, found: Findings) -> None:
    positions = max_positions(files)
    if positions is None or pool.request_tokens <= positions:
        return
    keys = f"{pool.engine_section}.prompt_length={pool.prompt_length} + response_length={pool.response_length}"
    if pool.engine.max_model_len is not None:
        keys = f"{pool.engine_section}.max_model_len={pool.engine.max_model_len}"
    found.errors.append(
        f"{keys}: {pool.request_tokens} tokens, but the reward model in {pool.path} has {positions} positions; use at "
        f"most {positions}"
    )


def _check_kind(config: PPOConfig, pool: EnginePool, files: ModelFiles, found: Findings) -> None:
    """Check that the model can score responses, or that a function asks it."""
    kind, field = model_kind(files.whole_config), f"{pool.path_key}={pool.path}"
    if kind is None:
        named = architecture(files.whole_config) or "no entry in architectures"
        found.errors.append(
            f"{field}: is not a reward model ({named}); use a sequence classifier with one label "
            "(...ForSequenceClassification) or a generative model (...ForCausalLM)"
        )
    elif kind == "generator" and config.reward.scored_by_model:
        found.errors.append(
            f"{field}: generates text ({architecture(files.whole_config)}), so a function has to ask it for a score; "
            f"set {_FUNCTION}, or use a sequence classifier with one label"
        )
    elif kind == "classifier" and config.reward.scored_by_model:
        if (labels := label_count(files)) != 1:
            found.errors.append(
                f"{field}: has {labels} labels, but a score is one number; use a classifier with one label, or choose "
                f"among the values of /classify in {_FUNCTION}"
            )
        _check_scored_samples(config, pool, found)


def _check_scored_samples(config: PPOConfig, pool: EnginePool, found: Findings) -> None:
    manager, longest = config.reward.reward_manager.name, longest_sample(config)
    if manager not in names.REWARD_MANAGERS:
        found.errors.append(
            f"reward.reward_manager.name={manager}: your manager cannot call a reward model that scores; use naive or "
            f"dapo, or ask the model in {_FUNCTION}"
        )
    if pool.request_tokens < longest:
        found.warnings.append(
            f"{pool.engine_section}: the reward model reads at most {pool.request_tokens} tokens, but a sample has up "
            f"to {longest} (data.max_prompt_length + data.max_response_length); a sample that is too long for it gets "
            "0.0. Raise prompt_length or response_length"
        )


def _check_tokenizer(config: PPOConfig, pool: EnginePool, target: Target, found: Findings) -> None:
    folder = str(pool.path)
    if target.without_files and not os.path.exists(folder):
        return
    if not has_tokenizer(folder):
        found.errors.append(
            f"{pool.path_key}={folder}: no tokenizer found (none of {', '.join(TOKENIZER_FILES)}); copy one into this "
            "directory"
        )
    elif config.reward.scored_by_model and read_template(Path(folder)) is None:
        found.errors.append(
            f"{pool.path_key}={folder}: its tokenizer has no chat template, with which prompt and response are put "
            "together; add chat_template.jinja to the directory"
        )
