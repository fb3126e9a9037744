"""`verl export`: write the model of a checkpoint as a Hugging Face directory."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from verl.config.actor import FSDPConfig
from verl.config.errors import ConfigError
from verl.utils.checkpoint_files import TRACKER, find_damage, later_checkpoints, resume_candidates, step_of

_DESCRIPTION = """\
Writes the weights of a checkpoint as a Hugging Face directory that differs from the trained model's directory only in
the weights. LoRA adapters are merged; lora_adapter/ in the output holds them in peft's format. The run needs no
hf_model in checkpoint.save_contents. The checksums of the checkpoint are compared first. One process, on the CPU.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add checkpoint, output and dtype to the parser."""
    parser.description = _DESCRIPTION
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a global_step_N directory, or the directory of a run for its last one"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="directory to write, new or empty; default: huggingface/global_step_N in the run"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "fp32", "bfloat16", "bf16"),
        help="dtype of the weights; auto: the dtype of each weight in the trained model's directory",
    )
    parser.add_argument(
        "--model", metavar="DIR", help="the trained model's directory, if it is no longer at model.path"
    )
    parser.add_argument("--critic", action="store_true", help="write the critic instead of the policy")


def run(options: argparse.Namespace) -> int:
    """Write the directory and print its path; return 1, with one line on stderr, if that is not possible."""
    try:
        checkpoint = _find(Path(options.checkpoint).absolute())
        default = checkpoint.parent / "huggingface" / (checkpoint.name + ("-critic" if options.critic else ""))
        target = Path(options.out or default).absolute()
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ValueError(f"--out {target}: exists; choose a new or empty directory")
        _export(checkpoint, target, options)
    except (ConfigError, ValueError, OSError) as error:
        sys.stderr.write(f"verl export: {error}\n")
        return 1
    sys.stdout.write(f"{target}\n")
    return 0


def _find(path: Path) -> Path:
    """Return the checkpoint, after comparing its checksums.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory; give a global_step_N directory or the directory of a run")
    candidates, problem = resume_candidates(path)
    checkpoint = candidates[0] if candidates else path
    step = step_of(checkpoint)
    if problem is not None:
        sys.stderr.write(f"verl export: {problem}; using the newest checkpoint, {checkpoint.name}\n")
    if candidates and (later := later_checkpoints(path, step)):
        names = ", ".join(other.name for other in later)
        sys.stderr.write(f"verl export: using {checkpoint.name}, which {TRACKER} names; later ones exist: {names}\n")
    damage = find_damage(checkpoint)
    if damage is not None:
        raise ValueError(f"{damage}; choose another checkpoint")
    return checkpoint


def _export(checkpoint: Path, target: Path, options: argparse.Namespace) -> None:
    from verl.config.record import read_record
    from verl.config.roles import resolve_critic
    from verl.extension.external import import_external
    from verl.workers.engine.export_checkpoint import export_checkpoint

    config = read_record(checkpoint)
    roles = config.actor_rollout_ref
    import_external(roles.model.external_lib or ())
    model: Any = roles.model
    fsdp: FSDPConfig = roles.actor.fsdp_config
    if options.critic:
        critic = resolve_critic(config)
        model, fsdp = critic.model, critic.fsdp
    if options.model is not None:
        model.path = str(Path(options.model).absolute())
    state = checkpoint / ("critic" if options.critic else "actor")
    if not (state / "model").is_dir():
        raise ValueError(f"{state}: holds no weights (model in checkpoint.save_contents); choose another checkpoint")
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        export_checkpoint(state, temporary, model, fsdp, dtype=options.dtype)
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
