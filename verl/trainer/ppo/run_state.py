"""The state of a run in a checkpoint directory: the models of the ranks and the state of the driver."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from verl.config.record import write_record
from verl.preflight.inputs import write_inputs
from verl.trainer.ppo.checkpoint import CheckpointError, load_driver_state, save_driver_state
from verl.trainer.ppo.quantization_guard import GuardState, restore_guard
from verl.trainer.ppo.runtime import Runtime
from verl.trainer.rollouts.prompts import LoaderState, PromptId
from verl.utils.checkpoint_files import DRIVER_STATE
from verl.utils.dataset.loader import ORDER_KEYS
from verl.workers.engine.hf_directory import HF_DIRECTORY
from verl.workers.train_worker import TrainWorker


class DriverState(TypedDict):
    """The driver's part of a checkpoint, as stored in `data.pt`.

    Keys:
        step: the finished training step.
        train_loader: state of the data loader after the last draw that was trained on.
        draws: number of draws before that state; `step` in checkpoints that lack it.
        kl_coef: weight of the KL penalty in the reward.
        carried: fields of the `PromptId`s that partial rollouts have in progress.
        guard: state of the guard of a quantized rollout, if the run has one.
    """

    step: int
    train_loader: dict[str, Any]
    draws: NotRequired[int]
    kl_coef: NotRequired[float]
    carried: NotRequired[list[tuple[int, ...]]]
    guard: NotRequired[GuardState]


class HFExportError(OSError):
    """The models could not be written in Hugging Face format. `errno` is None unless the operating system refused."""


async def save_run(runtime: Runtime, directory: Path, step: int) -> None:
    """Write everything that a run needs to resume into `directory`; `export_run` adds the other parts.

    Args:
        runtime: running, between two steps.
        directory: the directory of the checkpoint.
        step: the finished training step.
    """
    await runtime.processes.trainers.all(TrainWorker.save_checkpoint, str(directory))
    await runtime.processes.trainers.all(TrainWorker.checksum_files, str(directory))
    loader = runtime.data.prompts.state
    state = DriverState(
        step=step,
        train_loader=loader.loader,
        draws=loader.draws,
        kl_coef=runtime.kl_controller.value,
        carried=[tuple(prompt) for prompt in runtime.sampler.carried_prompts()],
    )
    if runtime.guard is not None:
        state["guard"] = runtime.guard.state
    save_driver_state(directory, state)
    write_record(runtime.config, directory)
    order = {name: loader.loader[name] for name in (*ORDER_KEYS, "sampler") if name in loader.loader}
    write_inputs(dataclasses.replace(runtime.inputs, data_order=order), directory)


async def export_run(runtime: Runtime, directory: Path) -> None:
    """Write the models in Hugging Face format into a checkpoint whose resumable part is complete, if the config asks.

    Raises:
        HFExportError: a model could not be written. Its directory is removed, so the checkpoint can be published.
    """
    try:
        await runtime.processes.trainers.all(TrainWorker.export_hf, str(directory))
        await runtime.processes.trainers.all(TrainWorker.checksum_files, str(directory))
    except Exception as error:
        for model in ("actor", "critic"):
            shutil.rmtree(directory / model / HF_DIRECTORY, ignore_errors=True)
        number = [error.errno] if isinstance(error, OSError) and error.errno is not None else []
        raise HFExportError(*number, f"{type(error).__name__}: {error}") from error


async def load_run(runtime: Runtime, directory: Path) -> int:
    """Restore the state of a checkpoint and return the step that it was written at.

    Raises:
        CheckpointError: the checkpoint cannot be read, or lacks the critic that this run trains.
        FileNotFoundError: a rank on another node does not see the checkpoint.
        ValueError: the checkpoint belongs to other data.
    """
    state = cast(DriverState, load_driver_state(directory))
    if not isinstance(state, dict) or not {"step", "train_loader"} <= state.keys():
        raise CheckpointError(
            f"{directory / DRIVER_STATE} does not hold the position of a run of this program: choose another "
            "checkpoint, or start over with trainer.resume_mode=disable"
        )
    config = runtime.config
    if runtime.with_critic and not (directory / "critic").is_dir():
        raise CheckpointError(
            f"{directory} has no critic, but algorithm.adv_estimator={config.algorithm.adv_estimator} trains one: "
            "resume a run that had a critic, or start over with trainer.resume_mode=disable"
        )
    await runtime.processes.check_visible({"checkpoint": directory})
    await runtime.processes.trainers.all(TrainWorker.load_checkpoint, str(directory))
    runtime.data.prompts.restore(LoaderState(state.get("draws", state["step"]), state["train_loader"]))
    runtime.sampler.resume_prompts([PromptId(*prompt) for prompt in state.get("carried", ())])
    if config.algorithm.kl_ctrl.type == "adaptive":
        runtime.kl_controller.value = state.get("kl_coef", runtime.kl_controller.value)
    restore_guard(runtime.guard, state.get("guard"))
    return int(state["step"])
