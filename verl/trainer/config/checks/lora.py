"""The LoRA keys: consistent, the adapter to start from whole, the layers they name in the checkpoint."""

from __future__ import annotations

import difflib

from verl.trainer.config.findings import Findings
from verl.trainer.config.lora import ALL_LINEAR, lora_options
from verl.trainer.config.model_files import ModelFiles
from verl.trainer.config.ppo import PPOConfig

_TARGETS = "actor_rollout_ref.model.target_modules"


def check_lora(config: PPOConfig, files: ModelFiles, found: Findings) -> None:
    """Look at the keys, at the adapter to start from, and for the layers in the checkpoint's headers."""
    try:
        options = lora_options(config.actor_rollout_ref.model)
    except (ValueError, OSError) as error:
        found.errors.append(str(error))
        return
    if options is not None and options.adapter_path is None:
        _check_targets(options.target_modules, files, found)


def _check_targets(targets: str | list[str], files: ModelFiles, found: Findings) -> None:
    layers = {
        name.removesuffix(".weight").rpartition(".")[2]
        for name, shape in files.shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    }
    if targets == ALL_LINEAR or not layers:
        return
    if isinstance(targets, str):
        if targets in layers:
            found.errors.append(
                f"{_TARGETS}={targets}: is a regular expression over whole names, which no layer has; use [{targets}]"
            )
        return
    if any(".experts." in name for name in files.shapes):
        return  # the model's own names may differ from those of its checkpoint
    for target in targets:
        if target.rpartition(".")[2] not in layers:
            near = difflib.get_close_matches(target.rpartition(".")[2], layers, n=3, cutoff=0.5) or sorted(layers)
            found.errors.append(f"{_TARGETS}: the model has no {target}; near it are {', '.join(near)}")
