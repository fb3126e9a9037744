"""The whole config: `PPOConfig`."""

# ruff: noqa: RUF009  (key, planned and section make dataclass fields)
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from verl.config.actor import ActorConfig
from verl.config.algorithm import AlgorithmConfig
from verl.config.critic import CriticConfig
from verl.config.data import DataConfig
from verl.config.model import ModelConfig
from verl.config.ref import RefConfig
from verl.config.reward import RewardConfig
from verl.config.rollout import RolloutConfig
from verl.config.schema import key, planned, section
from verl.config.trainer import TrainerConfig


@dataclass
class ActorRolloutRefConfig:
    """The model in its three roles."""

    model: ModelConfig = section(ModelConfig, "the model and how it is loaded")
    actor: ActorConfig = section(ActorConfig, "the policy that is trained")
    ref: RefConfig = section(RefConfig, "the frozen reference model")
    rollout: RolloutConfig = section(RolloutConfig, "the replicas that generate")
    hybrid_engine: bool = planned(True, "roles apart from each other", "use True, and rollout.nnodes=1 to part them")


@dataclass
class RayKwargs:
    """Settings of Ray."""

    ray_init: dict[str, Any] = key({"num_cpus": None}, "arguments of ray.init; null ones are left out")
    timeline_json_file: str | None = planned(None, "a Ray timeline", "use trainer.timeline")


@dataclass
class PPOConfig:
    """The whole config of a run."""

    data: DataConfig = section(DataConfig, "files, columns, lengths and batches of prompts")
    actor_rollout_ref: ActorRolloutRefConfig = section(ActorRolloutRefConfig, "the model in its three roles")
    critic: CriticConfig = section(CriticConfig, "the value model of PPO")
    algorithm: AlgorithmConfig = section(AlgorithmConfig, "from rewards to advantages")
    reward: RewardConfig = section(RewardConfig, "how a response is scored")
    trainer: TrainerConfig = section(TrainerConfig, "length of the run, devices, validation, checkpoints, logs")
    ray_kwargs: RayKwargs = section(RayKwargs, "settings of Ray")
    model_engine: str = key(
        "dp", "training engine", choices=("dp",), planned=("megatron", "veomni", "torchtitan"), use="use dp (FSDP2)"
    )
