"""Checks that trainer ranks on other nodes see the files that the driver sees: models, and checkpoint directories."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from verl.config import PPOConfig
from verl.config.roles import needs_critic
from verl.single_controller.worker_group import WorkerGroup
from verl.workers.train_worker import TrainWorker


def input_paths(config: PPOConfig) -> dict[str, str]:
    """Return the files and directories of this host that every rank reads, by config key."""
    roles = config.actor_rollout_ref
    paths = {
        "actor_rollout_ref.model.path": roles.model.path,
        "actor_rollout_ref.model.tokenizer_path": roles.model.tokenizer_path,
        "actor_rollout_ref.model.lora_adapter_path": roles.model.lora_adapter_path,
        "actor_rollout_ref.rollout.quantization_config_file": roles.rollout.quantization_config_file,
        "critic.model.path": config.critic.model.path if needs_critic(config) else None,
    }
    libraries = enumerate(roles.model.external_lib or ())
    paths |= {f"actor_rollout_ref.model.external_lib[{number}]": library for number, library in libraries}
    return {key: path for key, path in paths.items() if path is not None and os.path.exists(path)}


async def check_visible_paths(
    paths: Mapping[str, str | Path], ranks: WorkerGroup[TrainWorker], addresses: Sequence[str]
) -> None:
    """Check that every rank sees paths that exist on this host.

    Args:
        paths: files or directories by config key.
        ranks: the trainer ranks.
        addresses: address of each rank's node, for the error message.

    Raises:
        FileNotFoundError: a rank does not see a path.
    """
    keys = {str(Path(path).absolute()): key for key, path in paths.items()}
    for rank, missing in enumerate(await ranks.all(TrainWorker.missing_paths, list(keys))):
        for path in missing:
            raise FileNotFoundError(
                f"{keys[path]}={path}: rank {rank} on {addresses[rank]} does not see it; put it there at the same "
                "path, or on a file system that all nodes share"
            )


async def check_shared_directory(
    directory: str | Path, ranks: WorkerGroup[TrainWorker], addresses: Sequence[str]
) -> None:
    """Check at the start, before the first checkpoint, that every rank sees the checkpoint directory of the driver.

    The driver creates a file in the directory and every rank looks for it.

    Args:
        directory: `trainer.default_local_dir`; created if missing.
        ranks: the trainer ranks.
        addresses: address of each rank's node, for the error message.

    Raises:
        FileNotFoundError: a rank does not see the file, so its part of a checkpoint would be on another disk.
    """
    directory = Path(directory).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / f".visible-to-all-ranks-{uuid.uuid4().hex}"
    probe.touch()
    try:
        results = await ranks.all(TrainWorker.missing_paths, [str(probe)])
    finally:
        probe.unlink()
    blind = [f"rank {rank} on {addresses[rank]}" for rank, missing in enumerate(results) if missing]
    if blind:
        raise FileNotFoundError(
            f"trainer.default_local_dir={directory}: {', '.join(blind)} does not see files that the driver writes "
            "there; checkpoints need a file system that all nodes share, or use trainer.save_freq=-1"
        )
