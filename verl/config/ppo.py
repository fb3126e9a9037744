"""The whole config: `PPOConfig`."""

# ruff: noqa: RUF009  (key, unsupported and section return dataclass fields)
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from verl.config import names
from verl.config.actor import ActorConfig
from verl.config.algorithm import AlgorithmConfig
from verl.config.async_training import AsyncRolloutConfig, AsyncTrainingConfig
from verl.config.conditions import when
from verl.config.critic import CriticConfig
from verl.config.data import DataConfig
from verl.config.distillation import DistillationConfig
from verl.config.model import ModelConfig
from verl.config.profiler import GlobalProfilerConfig
from verl.config.ref import RefConfig
from verl.config.reward import RewardConfig
from verl.config.rollout import RolloutConfig
from verl.config.schema import ConfigSection, key, section, unsupported
from verl.config.skip import SkipConfig
from verl.config.trainer import TrainerConfig


@dataclass
class ActorRolloutRefConfig(ConfigSection):
    """The model in its three roles: actor, reference model and rollout."""

    model: ModelConfig = section(ModelConfig, "the model and how it is loaded")
    actor: ActorConfig = section(ActorConfig, "loss, optimizer, batches and sharding of the policy")
    ref: RefConfig = section(
        RefConfig,
        "the frozen reference model",
        only_with=when(
            "run.needs_ref",
            words="`actor_rollout_ref.actor.use_kl_loss=True` or `algorithm.use_kl_in_reward=True`",
            reason="without a reference model (actor.use_kl_loss=False, algorithm.use_kl_in_reward=False)",
        ),
    )
    rollout: RolloutConfig = section(RolloutConfig, "vLLM replicas, sampling, and weight updates")
    nccl_timeout: int = key(
        1800,
        "time limit for the trainer's ranks to wait for each other in one operation; the run fails if it is exceeded. "
        "Operations of some of the ranks (fsdp_size, ulysses_sequence_parallel_size, tensor_parallel_size) have "
        "torch's own limit",
        unit="seconds",
        at_least=1,
    )
    hybrid_engine: bool = key(
        True, "False: rollout.nnodes must give the replicas their own devices; True: rollout.nnodes decides"
    )


@dataclass
class RayKwargs(ConfigSection):
    """Settings of Ray."""

    ray_init: dict[str, Any] = key({"num_cpus": None}, "arguments of ray.init; null arguments are left out")
    timeline_json_file: str | None = unsupported(None, "a timeline of Ray", "use trainer.timeline")


@dataclass
class PPOConfig(ConfigSection):
    """The whole config of a run."""

    data: DataConfig = section(DataConfig, "files, columns, lengths and batches of prompts")
    actor_rollout_ref: ActorRolloutRefConfig = section(
        ActorRolloutRefConfig, "the model in its three roles: actor, reference model and rollout"
    )
    critic: CriticConfig = section(
        CriticConfig,
        "the value model of PPO",
        only_with=when(
            "run.needs_critic",
            words="an estimator that reads values, such as gae, or `critic.enable=True`",
            reason="without a critic (algorithm.adv_estimator={algorithm.adv_estimator})",
        ),
    )
    algorithm: AlgorithmConfig = section(AlgorithmConfig, "computation of advantages from rewards")
    reward: RewardConfig = section(RewardConfig, "scoring of responses")
    distillation: DistillationConfig = section(
        DistillationConfig, "distillation from a teacher model", only_with=when("distillation.enabled")
    )
    trainer: TrainerConfig = section(TrainerConfig, "length of the run, devices, validation, checkpoints and logs")
    async_training: AsyncTrainingConfig = section(
        AsyncTrainingConfig, "generation that goes on during training", only_with=when("async_training.enable")
    )
    rollout: AsyncRolloutConfig = section(
        AsyncRolloutConfig, "length of a fully asynchronous run", only_with=when("async_training.enable")
    )
    global_profiler: GlobalProfilerConfig = section(
        GlobalProfilerConfig, "device profiles of chosen steps: tool, steps and directory"
    )
    skip: SkipConfig = section(SkipConfig, "stages of chosen steps that read their results from files")
    ray_kwargs: RayKwargs = section(RayKwargs, "settings of Ray")
    model_engine: str = key(
        "dp",
        "training engine; dp: FSDP2",
        choices=("dp",),
        unsupported=names.UNSUPPORTED_ENGINES,
        use="use dp",
    )

    @property
    def max_model_len(self) -> int:
        """Token limit of a sequence in the rollout engine and the trainer."""
        return self.actor_rollout_ref.rollout.sequence_limit(self.data.max_prompt_length, self.data.max_response_length)
