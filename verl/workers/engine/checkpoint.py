"""Saves and loads an engine's state: sharded model and optimizer, schedule, random numbers.

`model/` and `optimizer/` are torch.distributed.checkpoint directories, readable with any number of ranks; of a model
with adapters they hold the adapters alone, and `lora_adapter/` holds them once more, as peft reads them. `engine.json`
is the schedule; `rng_rank_R.pt` the generators of rank R.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from verl.workers.engine import lora

logger = logging.getLogger(__name__)

CONTENTS = ("model", "optimizer", "extra")
HF_MODEL = "hf_model"
_ENGINE_FILE = "engine.json"


def save_state(
    path: Path,
    contents: Sequence[str],
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    schedule_step: int,
    device: torch.device,
    group: dist.ProcessGroup,
) -> None:
    """Write the parts named in `contents` (model, optimizer, extra = schedule and random numbers); collective."""
    _check_contents(contents, optimizer)
    rank = dist.get_rank(group)
    path.mkdir(parents=True, exist_ok=True)
    if "model" in contents:
        dcp.save(_trained(model), checkpoint_id=str(path / "model"), process_group=group)
        if lora.has_adapters(model):
            lora.write_adapter(model, path / lora.DIRECTORY, writes=rank == 0)
    if "optimizer" in contents:
        dcp.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=str(path / "optimizer"), process_group=group)
    if "extra" in contents:
        torch.save(_rng_state(device), path / f"rng_rank_{rank}.pt")
        if rank == 0:
            state = {"format": 1, "world_size": dist.get_world_size(group), "schedule_step": schedule_step}
            (path / _ENGINE_FILE).write_text(json.dumps(state) + "\n", encoding="utf-8")
    # no rank may rename or announce the directory before every rank's files are in it
    dist.barrier(group=group)


def load_state(
    path: Path,
    contents: Sequence[str],
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    device: torch.device,
    group: dist.ProcessGroup,
) -> int | None:
    """Read what `save_state` wrote, with any number of ranks; returns the schedule's step if `extra` is wanted.

    Raises:
        FileNotFoundError: a part is not in the checkpoint.
        ValueError: the checkpoint is of another model, or of other adapters.
    """
    _check_contents(contents, optimizer)
    for part in contents:
        file = path / (_ENGINE_FILE if part == "extra" else part)
        if not file.exists():
            raise FileNotFoundError(
                f"checkpoint {path} has no {file.name}: leave {part!r} out of checkpoint.load_contents, or "
                "resume from a checkpoint that was saved with it"
            )
    if "model" in contents:
        state = _trained(model)
        _check_fits(path, state, model)
        dcp.load(state, checkpoint_id=str(path / "model"), process_group=group)
        # With adapters, the model has frozen weights besides.
        set_model_state_dict(model, state, options=StateDictOptions(strict=not lora.has_adapters(model)))
    if "optimizer" in contents:
        state = get_optimizer_state_dict(model, optimizer)
        dcp.load(state, checkpoint_id=str(path / "optimizer"), process_group=group)
        set_optimizer_state_dict(model, optimizer, state)
    if "extra" not in contents:
        return None
    engine = json.loads((path / _ENGINE_FILE).read_text(encoding="utf-8"))
    if engine["world_size"] == dist.get_world_size(group):
        file = path / f"rng_rank_{dist.get_rank(group)}.pt"
        _set_rng_state(torch.load(file, weights_only=True), device)
    else:
        logger.info(
            "%s was saved by %d ranks: random numbers start afresh on %d",
            path,
            engine["world_size"],
            dist.get_world_size(group),
        )
    return int(engine["schedule_step"])


def _trained(model: torch.nn.Module) -> dict[str, Any]:
    """The model's state dict, of one with adapters without the frozen weights, which come from its own directory."""
    state = get_model_state_dict(model)
    if not lora.has_adapters(model):
        return state
    return {name: state[name] for name, parameter in model.named_parameters() if parameter.requires_grad}


def _check_fits(path: Path, state: dict[str, Any], model: torch.nn.Module) -> None:
    """The checkpoint has the tensors of `state` and no others: DCP would leave some out without a word."""
    if lora.has_adapters(model) and (path / lora.DIRECTORY).is_dir():
        lora.check_same_scale(model, path / lora.DIRECTORY)
    saved = {
        name: tuple(entry.size)
        for name, entry in dcp.FileSystemReader(str(path / "model")).read_metadata().state_dict_metadata.items()
        if isinstance(entry, dcp.metadata.TensorStorageMetadata)
    }
    ours = {name: tuple(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)}
    differing = sorted(name for name in saved.keys() | ours.keys() if saved.get(name) != ours.get(name))
    if differing:
        name = differing[0]
        raise ValueError(
            f"checkpoint {path} is of another model: {name} has shape {saved.get(name, 'none')} there and "
            f"{ours.get(name, 'none')} here ({len(differing)} differ); resume with the model.path, "
            "lora_rank and target_modules that it was saved with, or start afresh (trainer.resume_mode=disable)"
        )


def _check_contents(contents: Sequence[str], optimizer: torch.optim.Optimizer | None) -> None:
    for part in contents:
        if part not in CONTENTS:
            raise ValueError(f"checkpoint contents {list(contents)}: {part!r} is unknown, use {', '.join(CONTENTS)}")
    if "optimizer" in contents and optimizer is None:
        raise ValueError("checkpoint contents: this engine only runs forward and has no optimizer; leave it out")


def _rng_state(device: torch.device) -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "python": random.getstate(),
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def _set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"], device)
