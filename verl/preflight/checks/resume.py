"""The checkpoint that a run resumes from, and the differences between the configs of both runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from verl.config.ppo import PPOConfig
from verl.config.record import CONFIG_FILE, changes, flat
from verl.config.roles import needs_critic
from verl.config.schema import show
from verl.preflight.findings import Findings
from verl.utils.checkpoint_files import find_damage, resume_candidates, step_of
from verl.utils.tracking.plain import mask_secrets

_MAX_SHOWN = 20
# Keys that say how a run starts, and nothing about its training.
_OF_THE_START = frozenset(
    f"trainer.{name}" for name in ("resume_mode", "resume_from_path", "val_only", "val_before_train")
)


def describe_resume(config: PPOConfig) -> list[str]:
    """Return the lines of the plan about the checkpoint that the run resumes from; none for a new run.

    Only names and sizes of its files are compared here; the run compares checksums before it loads them.
    """
    checkpoint = _find_checkpoint(config)
    if checkpoint is None:
        return []
    lines = [f"from step {step_of(checkpoint)} ({checkpoint})"]
    recorded = _read_record(checkpoint)
    if recorded is None:
        return [*lines, "differences from that run: unknown, because it recorded no config"]
    differing = _differences(recorded, config)
    if not differing:
        return lines
    more = [f"and {len(differing) - _MAX_SHOWN} more keys"] if len(differing) > _MAX_SHOWN else []
    return [*lines, "differs from that run:", *differing[:_MAX_SHOWN], *more]


def check_contents(config: PPOConfig, found: Findings) -> None:
    """Check that the same command can resume from the checkpoints that the run writes."""
    trainer = config.trainer
    if trainer.save_freq <= 0 or trainer.resume_mode == "disable":
        return
    sections = {"actor_rollout_ref.actor": config.actor_rollout_ref.actor.checkpoint}
    if needs_critic(config):
        sections["critic"] = config.critic.checkpoint
    for name, checkpoint in sections.items():
        saved, loaded = checkpoint.saved_parts, checkpoint.loaded_parts
        missing = [part for part in loaded if part not in saved]
        if not checkpoint.save_contents:
            continue  # `check_directories` reports it
        if missing or "model" not in loaded:
            part = missing[0] if missing else "model"
            key = "load_contents" if "model" in saved and not missing else "save_contents"
            found.errors.append(
                f"{name}.checkpoint.{key}={show(getattr(checkpoint, key))}: the same command could not resume from its "
                f"checkpoints (trainer.resume_mode={trainer.resume_mode}), because they lack {part!r} or a resume does "
                "not load it; use [model,optimizer,extra] and, for the model in Hugging Face format, hf_model, or set "
                "trainer.resume_mode=disable"
            )
            continue
        fresh = [part for part in ("optimizer", "extra") if part not in loaded]
        if fresh:
            state = {"optimizer": "the optimizer's moments", "extra": "learning-rate schedule and random numbers"}
            found.warnings.append(
                f"{name}.checkpoint: a resumed run does not load {' and '.join(state[part] for part in fresh)}; add "
                f"{' and '.join(fresh)} to save_contents and load_contents to continue exactly"
            )


def _find_checkpoint(config: PPOConfig) -> Path | None:
    trainer = config.trainer
    if trainer.resume_mode == "resume_path" and trainer.resume_from_path:
        path = Path(trainer.resume_from_path)
        try:
            step_of(path)
        except ValueError:
            return None  # `check_directories` reports it
        return path if path.is_dir() else None
    if trainer.resume_mode != "auto":
        return None
    candidates, _ = resume_candidates(Path(trainer.default_local_dir))
    return next((path for path in candidates if find_damage(path, contents=False) is None), None)


def _read_record(checkpoint: Path) -> dict[str, Any] | None:
    """Return the config in the checkpoint or, for checkpoints of verl 0.1.0, in the directory of the run."""
    for folder in (checkpoint, checkpoint.parent):
        try:
            recorded = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(recorded, dict):
            return flat(recorded)
    return None


def _differences(recorded: dict[str, Any], config: PPOConfig) -> list[str]:
    """Return one line per key with another value."""
    present, changed = flat(mask_secrets(config)), changes(config)
    # A key that the other run's version did not have, with its default.
    new = {name for name in present if name not in recorded and name not in changed}
    names = [name for name in dict.fromkeys([*present, *recorded]) if name not in _OF_THE_START | new]
    return [
        f"{name}: {_shown(recorded, name)} -> {_shown(present, name)}"
        for name in names
        if recorded.get(name) != present.get(name)
    ]


def _shown(values: dict[str, Any], name: str) -> str:
    return show(values[name]) if name in values else "not set"
