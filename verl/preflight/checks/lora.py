"""The LoRA keys: consistent, the adapter to start from whole, the layers they name in the checkpoint."""

from __future__ import annotations

import difflib

from verl.config.lora import ALL_LINEAR, LoraOptions, lora_options, matches
from verl.config.ppo import PPOConfig
from verl.config.schema import show
from verl.preflight.findings import Findings
from verl.utils.model_dir.model_files import ModelFiles

_MODEL = "actor_rollout_ref.model."
_TARGETS, _EXCLUDED = f"{_MODEL}target_modules", f"{_MODEL}exclude_modules"
# A checkpoint may leave out, or have besides, the name under which the model keeps its body.
_BODIES = ("", "model.", "transformer.")


def check_lora(config: PPOConfig, files: ModelFiles, found: Findings) -> None:
    """Look at the keys, at the adapter to start from, and for the layers in the checkpoint's headers."""
    try:
        options = lora_options(config.actor_rollout_ref.model)
    except (ValueError, OSError) as error:
        found.errors.append(str(error))
        return
    # The names of a model with experts may differ from those of its checkpoint.
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
    wanted = body if targets == ALL_LINEAR else [name for name in layers if _fits(name, targets)]
    if all(matches(name, excluded) for name in wanted):
        found.errors.append(
            f"{_EXCLUDED}={show(excluded)}: leaves no layer of {_TARGETS}={show(targets)}; leave some of it out"
        )


def _check_names(key: str, given: str | list[str] | None, layers: list[str], found: Findings) -> None:
    ends = sorted({name.rpartition(".")[2] for name in layers})
    if isinstance(given, list):
        # What is excluded may be any module, so also what layers are in.
        names = layers if key == _TARGETS else [*layers, *_outer(layers)]
        for wanted in given:
            if not any(_fits(name, [wanted]) for name in names):
                near = difflib.get_close_matches(wanted.rpartition(".")[2], ends, n=3, cutoff=0.5) or ends
                found.errors.append(f"{key}: the model has no {wanted}; near it are {', '.join(near)}")
    elif given and given != ALL_LINEAR and not any(_fits(name, given) for name in layers):
        fix = f"use [{given}]" if given in ends else f"names are such as {layers[len(layers) // 2]}"
        found.errors.append(f"{key}={given}: is a regular expression over whole names, which no layer has; {fix}")


def _fits(name: str, modules: str | list[str]) -> bool:
    return any(matches(body + part, modules) for body in _BODIES for part in (name, name.partition(".")[2]) if part)


def _outer(layers: list[str]) -> set[str]:
    parts = [name.split(".") for name in layers]
    return {".".join(part[:i]) for part in parts for i in range(1, len(part))}
