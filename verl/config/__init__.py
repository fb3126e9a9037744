"""The typed config of a run. This package imports neither torch nor Ray nor vLLM.

`load_config(overrides)` composes YAML files and overrides into a `PPOConfig`. `verl.preflight.check(config)` then
checks it against the model, the data and the machine, and returns the `Plan` of the run.
"""

from verl.config.actor import (
    ActorConfig,
    CheckpointConfig,
    FSDPConfig,
    MegatronConfig,
    OptimConfig,
    PolicyLossConfig,
)
from verl.config.algorithm import (
    AlgorithmConfig,
    FilterGroupsConfig,
    KLCtrlConfig,
    RolloutCorrectionConfig,
)
from verl.config.critic import CriticConfig
from verl.config.data import CustomClassConfig, DataConfig
from verl.config.errors import ConfigError
from verl.config.load import from_hydra, load_config
from verl.config.lora import LoraOptions, lora_options
from verl.config.model import FusedKernelOptions, LoraConfig, ModelConfig
from verl.config.ppo import ActorRolloutRefConfig, PPOConfig, RayKwargs
from verl.config.ref import RefConfig
from verl.config.reward import CustomRewardFunctionConfig, RewardConfig, RewardManagerConfig
from verl.config.rollout import (
    AgentConfig,
    CheckpointEngineConfig,
    MultiTurnConfig,
    RolloutConfig,
    ServerConfig,
    ValKwargs,
)
from verl.config.trainer import TrainerConfig, V1Config

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
    "FusedKernelOptions",
    "KLCtrlConfig",
    "LoraConfig",
    "LoraOptions",
    "MegatronConfig",
    "ModelConfig",
    "MultiTurnConfig",
    "OptimConfig",
    "PPOConfig",
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
    "from_hydra",
    "load_config",
    "lora_options",
]
