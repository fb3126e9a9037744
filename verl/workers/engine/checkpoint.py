"""Saves and loads an engine's state: sharded model and optimizer, schedule, random numbers.

`model/` and `optimizer/` are torch.distributed.checkpoint directories, readable with any number of ranks;
`engine.json` is the schedule; `rng_rank_R.pt` the generators of rank R.
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
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

logger = logging.getLogger(__name__)

CONTENTS = ("model", "optimizer", "extra")
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
        dcp.save(get_model_state_dict(model), checkpoint_id=str(path / "model"), process_group=group)
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
    """
    _check_contents(contents, optimizer)
    for part in contents:
        file = path / (_ENGINE_FILE if part == "extra" else part)
        if not file.exists():
            raise FileNotFoundError(
                f"checkpoint {path} has no {file.name}: leave {part!r} out of actor.checkpoint.load_contents, or "
                "resume from a checkpoint that was saved with it"
            )
    if "model" in contents:
        state = get_model_state_dict(model)
        dcp.load(state, checkpoint_id=str(path / "model"), process_group=group)
        set_model_state_dict(model, state)
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
