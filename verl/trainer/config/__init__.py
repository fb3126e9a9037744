"""Typed configs of a run. Imports no torch, no Ray and no vLLM.

`load_config(overrides)` composes YAML files and overrides into a `PPOConfig`; `check(config)` compares it with the
model, the data and the machine, and derives the `Plan` of the run.
"""

from verl.trainer.config.actor import (
    ActorConfig,
    CheckpointConfig,
    FSDPConfig,
    MegatronConfig,
    OptimConfig,
    PolicyLossConfig,
)
from verl.trainer.config.algorithm import (
    AlgorithmConfig,
    FilterGroupsConfig,
    KLCtrlConfig,
    RolloutCorrectionConfig,
)
from verl.trainer.config.checks import check
from verl.trainer.config.critic import CriticConfig
from verl.trainer.config.data import CustomClassConfig, DataConfig
from verl.trainer.config.errors import ConfigError
from verl.trainer.config.load import from_hydra, load_config
from verl.trainer.config.lora import LoraOptions, lora_options
from verl.trainer.config.model import LoraConfig, ModelConfig
from verl.trainer.config.plan import Plan
from verl.trainer.config.ppo import ActorRolloutRefConfig, PPOConfig, RayKwargs
from verl.trainer.config.ref import RefConfig
from verl.trainer.config.reward import CustomRewardFunctionConfig, RewardConfig, RewardManagerConfig
from verl.trainer.config.rollout import (
    AgentConfig,
    CheckpointEngineConfig,
    MultiTurnConfig,
    RolloutConfig,
    ServerConfig,
    ValKwargs,
)
from verl.trainer.config.trainer import TrainerConfig, V1Config

__all__ = [
    "ActorConfig",
    "ActorRolloutRefConfig",
    "AgentConfig",
    "AlgorithmConfig",
    "CheckpointConfig",
    "CheckpointEngineConfig",
    "ConfigError",
    "CriticConfig",
    "CustomClassConfig",
    "CustomRewardFunctionConfig",
    "DataConfig",
    "FSDPConfig",
    "FilterGroupsConfig",
    "KLCtrlConfig",
    "LoraConfig",
    "LoraOptions",
    "MegatronConfig",
    "ModelConfig",
    "MultiTurnConfig",
    "OptimConfig",
    "PPOConfig",
    "Plan",
    "PolicyLossConfig",
    "RayKwargs",
    "RefConfig",
    "RewardConfig",
    "RewardManagerConfig",
    "RolloutConfig",
    "RolloutCorrectionConfig",
    "ServerConfig",
    "TrainerConfig",
    "V1Config",
    "ValKwargs",
    "check",
    "from_hydra",
    "load_config",
    "lora_options",
]
