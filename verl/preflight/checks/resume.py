"""The checkpoint that a run resumes from, and the differences between both runs: config, inputs, versions."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.config.ppo import PPOConfig
from verl.config.record import CONFIG_FILE, changes, flat
from verl.config.roles import needs_critic
from verl.config.schema import show
from verl.preflight.checks.data import DataInfo
from verl.preflight.checks.resume_model import check_resume_model
from verl.preflight.findings import Findings
from verl.preflight.inputs import INPUTS_FILE, RunInputs, changed_inputs, collect_inputs, data_seed, read_inputs
from verl.utils.checkpoint_files import (
    TRACKER,
    find_damage,
    later_checkpoints,
    list_checkpoints,
    resume_candidates,
    step_of,
)
from verl.utils.model_dir.model_files import ModelFiles
from verl.utils.plain_data import parse_yaml
from verl.utils.text import without_controls
from verl.utils.tracking.plain import mask_secrets

logger = logging.getLogger(__name__)

_MAX_SHOWN = 20
# Keys that say how a run starts, and nothing about its training.
_OF_THE_START = frozenset(
    f"trainer.{name}" for name in ("resume_mode", "resume_from_path", "val_only", "val_before_train")
)


def describe_resume(config: PPOConfig, device: str) -> list[str]:
    """Return the lines of the plan about the checkpoint that the run resumes from; none for a new run.

    Only names and sizes of its files are compared here; the run compares checksums before it loads them.

    Args:
        device: `cpu`, `cuda` or `npu`.
    """
    choice = _choose_checkpoint(config)
    checkpoint = choice.checkpoint
    if checkpoint is None:
        return []
    lines = [f"from step {step_of(checkpoint)} ({checkpoint})"]
    if choice.problem is not None:
        lines.append(f"{choice.problem}; this is the newest complete checkpoint")
    lines += [f"skips {path.name}: {damage}" for path, damage in choice.damaged]
    lines += _unused_checkpoints(config, checkpoint)
    differing = _differences_of(checkpoint, config, device)
    if not differing:
        return lines
    more = [f"and {len(differing) - _MAX_SHOWN} more"] if len(differing) > _MAX_SHOWN else []
    return [*lines, "differs from that run:", *differing[:_MAX_SHOWN], *more]


def check_resume(
    config: PPOConfig,
    data: DataInfo,
    found: Findings,
    model: ModelFiles | None = None,
    critic: ModelFiles | None = None,
) -> None:
    """Check that the checkpoint is complete, fits the models, and that the prompts continue in the order of its run.

    The run would refuse all of this when it loads the checkpoint, after its processes have started.

    Args:
        data: numbers of rows of this run.
        model, critic: files of the policy's and the critic's model, if they could be read.
    """
    _note_replaced_checkpoints(config, found)
    choice = _choose_checkpoint(config)
    if choice.checkpoint is None:
        if choice.damaged:
            damages = "; ".join(damage for _, damage in choice.damaged)
            key = "resume_from_path" if config.trainer.resume_mode == "resume_path" else "default_local_dir"
            found.errors.append(
                f"trainer.{key}={getattr(config.trainer, key)}: no complete checkpoint to resume from: {damages}; "
                "restore the files, choose another checkpoint (trainer.resume_mode=resume_path and "
                "trainer.resume_from_path), or start a new run with trainer.resume_mode=disable"
            )
        return
    check_resume_model(config, choice.checkpoint, model, critic, found)
    recorded = read_inputs(choice.checkpoint)
    if recorded is not None:
        _check_data_order(config, data, recorded.data_order, choice.checkpoint, found)


def check_steps_left(config: PPOConfig, total_steps: int | None, found: Findings) -> None:
    """Warn of a run that resumes from its last step, or from a later one.

    Args:
        total_steps: the last step of the run, or an upper bound; None if it is not known.
    """
    checkpoint = None if config.trainer.val_only else _choose_checkpoint(config).checkpoint
    if checkpoint is None or total_steps is None or step_of(checkpoint) < total_steps:
        return
    key = "total_epochs" if config.trainer.total_training_steps is None else "total_training_steps"
    found.warnings.append(
        f"trainer.{key}={getattr(config.trainer, key)}: the run ends after step {total_steps} and resumes from step "
        f"{step_of(checkpoint)} ({checkpoint}), so nothing is left to train; raise trainer.{key}, or start a new run "
        "with trainer.resume_mode=disable"
    )


def _note_replaced_checkpoints(config: PPOConfig, found: Findings) -> None:
    trainer = config.trainer
    if trainer.resume_mode != "disable" or trainer.save_freq <= 0:
        return
    steps = ", ".join(str(step_of(path)) for path in list_checkpoints(Path(trainer.default_local_dir)))
    if steps:
        found.notes.append(
            f"trainer.resume_mode=disable: {trainer.default_local_dir} holds checkpoints of an earlier run (steps "
            f"{steps}); this run replaces each when it saves the same step"
        )


def _check_data_order(
    config: PPOConfig, data: DataInfo, before: Mapping[str, int | bool | str], checkpoint: Path, found: Findings
) -> None:
    """Check rows and sampler, or rows, shuffling and seed, which decide the order of the prompts."""
    way_out = f"to continue {checkpoint}, or start a new run with trainer.resume_mode=disable"
    section = config.data.sampler
    sampler = None if section.class_path is None else section.class_name
    if before and before.get("sampler") != sampler:
        found.errors.append(
            f"data.sampler.class_name={show(sampler)}: the run that wrote the checkpoint had "
            f"{show(before.get('sampler'))}, so its position belongs to another order of the prompts; restore "
            f"data.sampler {way_out}"
        )
        return
    if "shuffle" in before and before["shuffle"] != config.data.shuffle:
        found.errors.append(
            f"data.shuffle={config.data.shuffle}: the run that wrote the checkpoint had {before['shuffle']}, so its "
            f"position belongs to another order of the prompts; set data.shuffle={before['shuffle']} {way_out}"
        )
    if "seed" in before and before["seed"] != data_seed(config):
        key = "trainer.seed" if config.data.seed is None else "data.seed"
        found.errors.append(
            f"{key}={data_seed(config)}: the run that wrote the checkpoint ordered the prompts with seed "
            f"{before['seed']}; set data.seed={before['seed']} {way_out}"
        )
    rows = before.get("rows")
    if data.train is None or not isinstance(rows, int) or data.train == rows:
        return
    # `filter_overlong_prompts` may drop the rows that there are more.
    if data.train < rows or not config.data.filter_overlong_prompts:
        found.errors.append(
            f"data.train_files={show(config.data.train_files)}: has {data.train} prompts, but the checkpoint is a "
            f"position in the order of {rows} prompts; restore the files (or data.train_max_samples) {way_out}, for "
            "example from the model that `verl export` writes"
        )


def warn_of_changed_inputs(checkpoint: Path, now: RunInputs) -> None:
    """Log a warning for each input, apart from the config, that differs from the run that wrote a checkpoint."""
    before = read_inputs(checkpoint)
    if before is None:
        logger.warning("%s has no %s: contents of files are not compared", checkpoint, INPUTS_FILE)
        return
    for line in changed_inputs(before, now):
        logger.warning("differs from the run that wrote %s: %s", checkpoint, line)


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


@dataclass(frozen=True)
class _Choice:
    """The checkpoint that a run resumes from.

    Attributes:
        checkpoint: None for a new run, or if every candidate is damaged.
        problem: the reason why the tracker file names no checkpoint; None if it names one or is not read.
        damaged: the candidates before it, each with its damage.
    """

    checkpoint: Path | None = None
    problem: str | None = None
    damaged: tuple[tuple[Path, str], ...] = ()


def _choose_checkpoint(config: PPOConfig) -> _Choice:
    trainer = config.trainer
    problem = None
    if trainer.resume_mode == "resume_path" and trainer.resume_from_path:
        path = Path(trainer.resume_from_path)
        try:
            step_of(path)
        except ValueError:
            return _Choice()  # `check_directories` reports it
        candidates = [path] if path.is_dir() else []
    elif trainer.resume_mode == "auto":
        candidates, problem = resume_candidates(Path(trainer.default_local_dir))
    else:
        return _Choice()
    damaged: list[tuple[Path, str]] = []
    for path in candidates:
        damage = find_damage(path, contents=False)
        if damage is None:
            return _Choice(path, problem, tuple(damaged))
        damaged.append((path, without_controls(damage)))
    return _Choice(None, problem, tuple(damaged))


def _unused_checkpoints(config: PPOConfig, checkpoint: Path) -> list[str]:
    """Return a line about complete checkpoints of later steps in the directory of the run."""
    trainer = config.trainer
    later = later_checkpoints(Path(trainer.default_local_dir), step_of(checkpoint))
    if not later:
        return []
    steps = ", ".join(str(step_of(path)) for path in later)
    why = f"{TRACKER} names step {step_of(checkpoint)}" if trainer.resume_mode == "auto" else "trainer.resume_from_path"
    replaced = "" if trainer.save_freq <= 0 else "; this run replaces each when it saves the same step"
    return [
        f"does not use the later checkpoints of steps {steps} ({why}){replaced}; trainer.resume_mode=resume_path "
        f"trainer.resume_from_path={later[-1]} resumes from the last one"
    ]


def _differences_of(checkpoint: Path, config: PPOConfig, device: str) -> list[str]:
    """Return the lines about inputs and config keys that differ from the run that wrote the checkpoint."""
    before = read_inputs(checkpoint)
    lines = [f"contents of files: not compared, because the checkpoint has no {INPUTS_FILE}"]
    if before is not None:
        lines = changed_inputs(before, collect_inputs(config, device))
    recorded = _read_record(checkpoint)
    if recorded is None:
        return [*lines, "config: not compared, because that run recorded none"]
    return [*lines, *_differences(recorded, config)]


def _read_record(checkpoint: Path) -> dict[str, Any] | None:
    """Return the config in the checkpoint or, for checkpoints of verl 0.1.0, in the directory of the run."""
    for folder in (checkpoint, checkpoint.parent):
        try:
            recorded = parse_yaml((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
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
