"""The parts and tensors of the checkpoint that a run resumes from, beside the model and the adapters of this run.

The trainer compares every tensor when it loads a checkpoint, after all processes have started. Here only files are
read, and a tensor counts only if its name has the same meaning in the checkpoint and in the model's files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from verl.config.actor import CheckpointConfig
from verl.config.lora import ALL_LINEAR, LoraOptions, lora_options, matches
from verl.config.ppo import PPOConfig
from verl.config.roles import needs_critic, resolve_critic
from verl.config.schema import show
from verl.preflight.findings import Findings
from verl.utils.checkpoint_files import DRIVER_STATE, ENGINE_STATE
from verl.utils.checkpoint_tensors import saved_shapes
from verl.utils.model_dir.model_files import ModelFiles

Shapes = Mapping[str, tuple[int, ...]]

_FILES = {"model": "model", "optimizer": "optimizer", "extra": ENGINE_STATE}
_ADAPTER = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])\.[^.]+\.weight")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")
# Keys of config.json that describe the parts of a model with several stacks of layers.
_STACKS = ("text_config", "vision_config", "audio_config", "thinker_config", "llm_config")
_NEW_RUN = "or start a new run with trainer.resume_mode=disable"


def check_resume_model(
    config: PPOConfig, checkpoint: Path, model: ModelFiles | None, critic: ModelFiles | None, found: Findings
) -> None:
    """Check that the checkpoint has every part that the run loads, for the model and the adapters of this run.

    Args:
        checkpoint: a complete checkpoint.
        model, critic: files of the policy's and the critic's model; None if they could not be read.
    """
    if not (checkpoint / DRIVER_STATE).is_file():
        found.errors.append(
            f"{checkpoint} has no {DRIVER_STATE}, the position in the data: it is no checkpoint of this program, or a "
            f"part of one; choose another checkpoint, {_NEW_RUN}"
        )
    actor = config.actor_rollout_ref
    if _has_parts("actor_rollout_ref.actor", checkpoint / "actor", actor.actor.checkpoint, found):
        try:
            options = lora_options(actor.model)
        except (ValueError, OSError):
            return  # `check_lora` reports it
        _check_tensors("actor_rollout_ref.model", checkpoint / "actor", model, options, found)
    if not needs_critic(config):
        return
    if not (checkpoint / "critic").is_dir():
        found.errors.append(
            f"{checkpoint} has no critic, but algorithm.adv_estimator={config.algorithm.adv_estimator} trains one; "
            f"resume a run that had a critic, {_NEW_RUN}"
        )
    elif _has_parts("critic", checkpoint / "critic", resolve_critic(config).checkpoint, found):
        _check_tensors("critic.model", checkpoint / "critic", critic, None, found)


def _has_parts(section: str, directory: Path, contents: CheckpointConfig, found: Findings) -> bool:
    """Return True if the parts to load are there."""
    missing = [part for part in contents.loaded_parts if part in _FILES and not (directory / _FILES[part]).exists()]
    for part in missing:
        found.errors.append(
            f"{section}.checkpoint.load_contents: {directory} has no {_FILES[part]}, which a resume with {part!r} "
            f"loads; leave {part} out, choose a checkpoint that was saved with it, {_NEW_RUN}"
        )
    return not missing and "model" in contents.loaded_parts


def _check_tensors(
    section: str, directory: Path, files: ModelFiles | None, options: LoraOptions | None, found: Findings
) -> None:
    try:
        saved = saved_shapes(directory / "model")
    except FileNotFoundError:
        found.errors.append(
            f"{directory / 'model'} has no .metadata, so no tensor can be read from it; choose another checkpoint, "
            f"{_NEW_RUN}"
        )
        return
    if not saved or files is None:
        return
    adapters = {name: shape for name, shape in saved.items() if _ADAPTER.fullmatch(name)}
    problem = _adapter_problem(section, adapters, options)
    if problem is None:
        problem = _model_problem(adapters, files) if adapters else _weight_problem(saved, files)
        problem = problem and f"{section}.path={files.path}: {problem}; use the model that it was saved with"
    if problem is not None:
        found.errors.append(f"{problem} to continue {directory.parent}, {_NEW_RUN}")


def _adapter_problem(section: str, adapters: Shapes, options: LoraOptions | None) -> str | None:
    """Return how rank or layers of the saved adapters differ from those of this run; None if they do not."""
    ranks = {shape[0] for name, shape in adapters.items() if ".lora_A." in name and shape}
    if options is None:
        if not adapters:
            return None
        rank = f"set lora_rank={min(ranks)}" if ranks else "set lora_rank"
        return f"{section}.lora_rank=0: the checkpoint holds adapters of a model, and not the model; {rank}"
    source = f"{section}.lora_rank={options.rank}"
    if options.adapter_path is not None:
        source = f"{section}.lora_adapter_path={options.adapter_path} (rank {options.rank})"
    if not adapters:
        return f"{source}: the checkpoint holds a whole model without adapters; leave the keys of LoRA out"
    if not options.shaping and ranks and ranks != {options.rank}:
        return f"{source}: the adapters in the checkpoint have rank {min(ranks)}; set lora_rank={min(ranks)}"
    layers = sorted({match["layer"] for name in adapters if (match := _ADAPTER.fullmatch(name))})
    targets = options.target_modules
    if isinstance(targets, str) or ALL_LINEAR in targets or options.shaping:
        return None
    names = sorted({layer.rpartition(".")[2] for layer in layers})
    unused = [name for name in targets if not any(matches(layer, [name]) for layer in layers)]
    other = [layer for layer in layers if not matches(layer, targets)]
    if unused or other:
        return (
            f"{section}.target_modules={show(targets)}: the checkpoint has adapters in the layers {', '.join(names)}; "
            f"set target_modules=[{','.join(names)}]"
        )
    return None


def _model_problem(adapters: Shapes, files: ModelFiles) -> str | None:
    """Return how the layers of saved adapters differ from those of the model; None if they do not."""
    for name, shape in adapters.items():
        match = _ADAPTER.fullmatch(name)
        weight = files.shapes.get(f"{match['layer']}.weight") if match else None
        if match is None or weight is None or len(weight) != 2 or len(shape) != 2:
            continue
        # A is [rank, in], B is [out, rank], the weight [out, in]; some models store [in, out].
        side = shape[1] if match["part"] == "A" else shape[0]
        if side not in weight:
            return (
                f"{match['layer']} has shape {list(weight)} in the model, and an adapter of shape {list(shape)} in the "
                "checkpoint"
            )
    return _depth_problem(adapters, files)


def _weight_problem(saved: Shapes, files: ModelFiles) -> str | None:
    """Return how the saved tensors differ from those of the model; None if they do not, or if it is not known."""
    if not files.shapes:
        return _depth_problem(saved, files)
    common = [name for name in saved if name in files.shapes]
    for name in common:
        # transformers transposes and joins the weights of experts when it loads them.
        if saved[name] != files.shapes[name] and "expert" not in name:
            return f"{name} has shape {list(files.shapes[name])}, and {list(saved[name])} in the checkpoint"
    # A model may have other names than its files, but not other endings of all of its names.
    if not common and not {_ending(name) for name in saved} & {_ending(name) for name in files.shapes}:
        name = next(iter(saved))
        return f"the checkpoint holds another kind of model: {name} and the others are unknown to this one"
    return _depth_problem(saved, files)


def _depth_problem(saved: Shapes, files: ModelFiles) -> str | None:
    """Return the difference in the number of decoder layers; None if there is none, or several stacks of layers."""
    numbers = [int(match[1]) for name in saved if (match := _LAYER.search(name))]
    if not numbers or files.layers is None or any(key in files.whole_config for key in _STACKS):
        return None
    layers = max(numbers) + 1
    # An adapter may be in some of the layers only.
    of_adapters = any(_ADAPTER.fullmatch(name) for name in saved)
    if layers > files.layers or (layers < files.layers and not of_adapters):
        return f"it has {files.layers} layers, and the model in the checkpoint has {layers}"
    return None


def _ending(name: str) -> str:
    return ".".join(name.split(".")[-2:])
