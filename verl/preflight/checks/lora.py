"""Checks of LoRA's keys in `actor_rollout_ref.model`: consistency, the initial adapter, and names of layers."""

from __future__ import annotations

import difflib

from verl.config.lora import ALL_LINEAR, LoraOptions, lora_options, matches
from verl.config.ppo import PPOConfig
from verl.config.schema import show
from verl.preflight.findings import Findings
from verl.utils.model_dir.model_files import ModelFiles

_MODEL = "actor_rollout_ref.model."
_TARGETS, _EXCLUDED = f"{_MODEL}target_modules", f"{_MODEL}exclude_modules"
# Prefixes of layer names by which a checkpoint and its model can differ.
_BODY_PREFIXES = ("", "model.", "transformer.")


def check_lora(config: PPOConfig, files: ModelFiles, found: Findings) -> None:
    """Check the keys and the initial adapter, and look for the layers in the headers of the checkpoint."""
    try:
        options = lora_options(config.actor_rollout_ref.model)
    except (ValueError, OSError) as error:
        found.errors.append(str(error))
        return
    if options is None and (excluded := config.actor_rollout_ref.model.exclude_modules):
        found.warnings.append(
            f"{_EXCLUDED}={show(excluded)} has no effect: there are no adapters ({_MODEL}lora_rank=0)"
        )
    # A model with experts can have other layer names than its checkpoint.
    if options is not None and options.adapter_path is None and not any(".experts." in name for name in files.shapes):
        _check_layers(options, files, found)


def _check_layers(options: LoraOptions, files: ModelFiles, found: Findings) -> None:
    layers = sorted(
        name.removesuffix(".weight")
        for name, shape in files.shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    )
    if not layers:
        return
    targets, excluded, before = options.target_modules, options.exclude_modules, len(found.errors)
    _check_names(_TARGETS, targets, layers, found)
    _check_names(_EXCLUDED, excluded, layers, found)
    if len(found.errors) > before or not excluded:
        return
    body = [name for name in layers if not name.endswith(("embed_tokens", "lm_head", "wte", "wpe"))]
    wanted = body if targets == ALL_LINEAR else [name for name in layers if _matches_any_prefix(name, targets)]
    if all(matches(name, excluded) for name in wanted):
        found.errors.append(
            f"{_EXCLUDED}={show(excluded)}: excludes every layer of {_TARGETS}={show(targets)}; remove some of its "
            "names"
        )


def _check_names(key: str, given: str | list[str] | None, layers: list[str], found: Findings) -> None:
    """Check that each name, or the regular expression, matches a layer of the checkpoint."""
    last_parts = sorted({name.rpartition(".")[2] for name in layers})
    if isinstance(given, list):
        # An excluded module can be any module, so also one that contains layers.
        names = layers if key == _TARGETS else [*layers, *_outer_modules(layers)]
        for wanted in given:
            if not any(_matches_any_prefix(name, [wanted]) for name in names):
                similar = difflib.get_close_matches(wanted.rpartition(".")[2], last_parts, n=3, cutoff=0.5)
                hint = f"similar names: {', '.join(similar)}" if similar else f"use one of {', '.join(last_parts)}"
                found.errors.append(f"{key}: the model has no layer {wanted}; {hint}")
    elif given and given != ALL_LINEAR and not any(_matches_any_prefix(name, given) for name in layers):
        fix = f"use [{given}]" if given in last_parts else f"a full name is e.g. {layers[len(layers) // 2]}"
        found.errors.append(f"{key}={given}: this regular expression matches no full name of a layer; {fix}")


def _matches_any_prefix(name: str, modules: str | list[str]) -> bool:
    parts = [part for part in (name, name.partition(".")[2]) if part]
    return any(matches(prefix + part, modules) for prefix in _BODY_PREFIXES for part in parts)


def _outer_modules(layers: list[str]) -> set[str]:
    parts = [name.split(".") for name in layers]
    return {".".join(part[:i]) for part in parts for i in range(1, len(part))}
