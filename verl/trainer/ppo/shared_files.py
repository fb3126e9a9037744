"""Whether every rank of a trainer on several hosts sees what the driver sees: models, checkpoints, where these go."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from verl.config import PPOConfig
from verl.config.roles import needs_critic
from verl.single_controller.worker_group import WorkerGroup
from verl.workers.train_worker import TrainWorker

Ranks = WorkerGroup[TrainWorker]


def files_of(config: PPOConfig) -> dict[str, str]:
    """By config key: files and directories of this host that every rank reads."""
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


async def check_seen(paths: Mapping[str, str | Path], ranks: Ranks, addresses: Sequence[str]) -> None:
    """Have every rank look for paths that are there on this host.

    Args:
        paths: by config key.
        addresses: of each rank's host, for the message.

    Raises:
        FileNotFoundError: a rank does not see one.
    """
    keys = {str(Path(path).absolute()): key for key, path in paths.items()}
    for rank, absent in enumerate(await ranks.all(TrainWorker.missing_paths, list(keys))):
        for path in absent:
            raise FileNotFoundError(
                f"{keys[path]}={path}: rank {rank} on {addresses[rank]} does not see it; put it there at the same "
                "path, or on a file system that all nodes share"
            )


async def check_shared(directory: str | Path, ranks: Ranks, addresses: Sequence[str]) -> None:
    """Make a file where checkpoints go and have every rank look for it; at the start, not at the first checkpoint.

    Args:
        directory: `trainer.default_local_dir`; made if missing.
        addresses: of each rank's host, for the message.

    Raises:
        FileNotFoundError: a rank does not see it: its part of a checkpoint would be on another disk.
    """
    directory = Path(directory).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / f".seen-by-all-ranks-{uuid.uuid4().hex}"
    probe.touch()
    try:
        answers = await ranks.all(TrainWorker.missing_paths, [str(probe)])
    finally:
        probe.unlink()
    blind = [f"rank {rank} on {addresses[rank]}" for rank, absent in enumerate(answers) if absent]
    if blind:
        raise FileNotFoundError(
            f"trainer.default_local_dir={directory}: {', '.join(blind)} does not see what is written there by the "
            "driver; checkpoints need a file system that all nodes share, or use trainer.save_freq=-1"
        )
