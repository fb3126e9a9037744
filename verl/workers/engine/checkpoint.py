"""Save and load an engine's state: sharded model and optimizer, schedule, random number generators.

| path | content |
|---|---|
| `model/`, `optimizer/` | torch.distributed.checkpoint directories, readable with any number of ranks |
| `lora_adapter/` | only with adapters: the adapters in peft's format; `model/` then holds only the adapters |
| `engine.json` | the step of the learning-rate schedule |
| `rng_rank_R.pt` | the random number generators of rank R |
"""

from __future__ import annotations

import io
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
from torch.distributed.tensor import DTensor

from verl.utils.checkpoint_files import ENGINE_STATE
from verl.workers.engine import lora
from verl.workers.engine.rank_errors import RankErrors, checkpoint_errors
from verl.workers.engine.tensor_parallel import TensorParallel

logger = logging.getLogger(__name__)

CONTENTS = ("model", "optimizer", "extra")


def save_state(
    path: Path,
    contents: Sequence[str],
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    schedule_step: int,
    device: torch.device,
    group: dist.ProcessGroup,
    tensor: TensorParallel | None = None,
) -> None:
    """Write the parts in `contents`: model, optimizer, extra (schedule and random number generators). Collective.

    Raises:
        ValueError: an unknown part, or `optimizer` of an engine without an optimizer.
        RankFilesError: a rank could not write its files; raised on all ranks.
    """
    _check_contents(contents, optimizer)
    rank, errors = dist.get_rank(group), RankErrors()
    with errors.collect():
        path.mkdir(parents=True, exist_ok=True)
    errors.raise_together(group)
    if "model" in contents:
        with checkpoint_errors():
            dcp.save(_whole(_trained_state(model), tensor), checkpoint_id=str(path / "model"), process_group=group)
        if lora.has_adapters(model):
            tensors = lora.gather_adapter(model, device, keep=rank == 0)
            with errors.collect():
                if rank == 0:
                    lora.write_adapter(model, tensors, path / lora.DIRECTORY)
    if optimizer is not None and "optimizer" in contents:
        state = _whole_optimizer(get_optimizer_state_dict(model, optimizer), tensor)
        with checkpoint_errors():
            dcp.save(state, checkpoint_id=str(path / "optimizer"), process_group=group)
    if "extra" in contents:
        with errors.collect():
            _write_extra(path, device, schedule_step, group)
    # No rank may rename or announce the directory before it contains the files of all ranks.
    errors.raise_together(group)


def _write_extra(path: Path, device: torch.device, schedule_step: int, group: dist.ProcessGroup) -> None:
    rank = dist.get_rank(group)
    state = io.BytesIO()
    torch.save(_rng_state(device), state)
    # Not by torch.save, whose error names neither the file nor errno.
    (path / f"rng_rank_{rank}.pt").write_bytes(state.getvalue())
    if rank == 0:
        engine = {"format": 1, "world_size": dist.get_world_size(group), "schedule_step": schedule_step}
        (path / ENGINE_STATE).write_text(json.dumps(engine) + "\n", encoding="utf-8")


def load_state(
    path: Path,
    contents: Sequence[str],
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    device: torch.device,
    group: dist.ProcessGroup,
    tensor: TensorParallel | None = None,
) -> int | None:
    """Read the state that `save_state` wrote with any number of ranks. Collective.

    Returns:
        the step of the schedule, None without `extra` in `contents`.

    Raises:
        FileNotFoundError: the checkpoint lacks a part.
        RankFilesError: a rank could not read its part of model or optimizer; raised on all ranks.
        ValueError: an unknown part, or the checkpoint belongs to another model or other adapters.
    """
    _check_contents(contents, optimizer)
    for part in contents:
        file = path / (ENGINE_STATE if part == "extra" else part)
        if not file.exists():
            raise FileNotFoundError(
                f"checkpoint {path} has no {file.name}: remove {part!r} from checkpoint.load_contents, or resume from "
                "a checkpoint that was saved with it"
            )
    if "model" in contents:
        state = _trained_state(model)
        whole = _whole(state, tensor)
        _check_same_tensors(path, whole, model)
        with checkpoint_errors():
            dcp.load(whole, checkpoint_id=str(path / "model"), process_group=group)
        # With adapters, the model also has frozen weights, which `state` does not contain.
        set_model_state_dict(model, state, options=StateDictOptions(strict=not lora.has_adapters(model)))
    if optimizer is not None and "optimizer" in contents:
        parts = get_optimizer_state_dict(model, optimizer)
        state = _whole_optimizer(parts, tensor)
        with checkpoint_errors():
            dcp.load(state, checkpoint_id=str(path / "optimizer"), process_group=group)
        set_optimizer_state_dict(model, optimizer, _parts_of_optimizer(state, parts))
    if "extra" not in contents:
        return None
    engine = json.loads((path / ENGINE_STATE).read_text(encoding="utf-8"))
    if engine["world_size"] == dist.get_world_size(group):
        file = path / f"rng_rank_{dist.get_rank(group)}.pt"
        _set_rng_state(torch.load(file, weights_only=True), device)
    else:
        logger.info(
            "%s was saved by %d ranks: the random number generators are not restored on %d ranks",
            path,
            engine["world_size"],
            dist.get_world_size(group),
        )
    return int(engine["schedule_step"])


def _trained_state(model: torch.nn.Module) -> dict[str, Any]:
    """Return the model's state dict; with adapters, without the frozen weights, which are read from `model.path`."""
    state = get_model_state_dict(model)
    if not lora.has_adapters(model):
        return state
    return {name: state[name] for name, parameter in model.named_parameters() if parameter.requires_grad}


def _whole(state: dict[str, Any], tensor: TensorParallel | None) -> dict[str, Any]:
    """Return the state with undivided parameters, which share the memory of this rank's parts."""
    return state if tensor is None else {name: tensor.whole(name, part) for name, part in state.items()}


def _whole_optimizer(state: dict[str, Any], tensor: TensorParallel | None) -> dict[str, Any]:
    """Return the optimizer's state for undivided parameters, which shares the memory of this rank's parts."""
    if tensor is None:
        return state
    moments = {
        name: {key: tensor.whole(name, value) for key, value in values.items()}
        for name, values in state["state"].items()
    }
    return {**state, "state": moments}


def _parts_of_optimizer(state: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    """Return a state of `_whole_optimizer` with the tensors of `parts`, whose memory it shares."""
    moments = {
        name: {key: parts["state"][name][key] if isinstance(value, DTensor) else value for key, value in values.items()}
        for name, values in state["state"].items()
    }
    return {**state, "state": moments}


def _check_same_tensors(path: Path, state: dict[str, Any], model: torch.nn.Module) -> None:
    """Check that the checkpoint has exactly the tensors of `state`: DCP would skip the others silently.

    Raises:
        ValueError: names, shapes or the adapters' scale differ.
    """
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
            f"checkpoint {path} belongs to another model: {name} has shape {saved.get(name, 'none')} in the checkpoint "
            f"and {ours.get(name, 'none')} in the model ({len(differing)} tensors differ); resume with the model.path, "
            "lora_rank and target_modules that it was saved with, or start a new run (trainer.resume_mode=disable)"
        )


def _check_contents(contents: Sequence[str], optimizer: torch.optim.Optimizer | None) -> None:
    for part in contents:
        if part not in CONTENTS:
            raise ValueError(
                f"unknown part {part!r} in checkpoint contents {list(contents)}: use {', '.join(CONTENTS)}"
            )
    if "optimizer" in contents and optimizer is None:
        raise ValueError("checkpoint contents: this engine has no optimizer; remove 'optimizer'")


def _rng_state(device: torch.device) -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
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
