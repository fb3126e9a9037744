"""`reward.reward_model`: a model that scores responses, or that the user's reward function asks."""

# ruff: noqa: RUF009  (key, unsupported and section return dataclass fields)
from __future__ import annotations

from dataclasses import dataclass

from verl.config.conditions import when
from verl.config.fixed_engine import FixedEngineConfig
from verl.config.schema import ConfigSection, key, section, unsupported

_OWN_DEVICES = when("enable_resource_pool")


@dataclass
class RewardModelEngineConfig(FixedEngineConfig):
    """The engines of the reward model."""

    max_model_len: int | None = key(
        None,
        "maximum length of a request with its reply; null: prompt_length + response_length",
        unit="tokens",
        at_least=1,
    )
    prompt_length: int = key(
        2048,
        "with response_length: the default of max_model_len",
        unit="tokens",
        at_least=1,
        only_with=when("max_model_len", None),
    )
    response_length: int = key(
        2048,
        "with prompt_length: the default of max_model_len",
        unit="tokens",
        at_least=1,
        only_with=when("max_model_len", None),
    )
    skip_tokenizer_init: bool = unsupported(False, "an engine without a tokenizer")


@dataclass
class RewardModelConfig(ConfigSection):
    """A reward model: one that scores (sequence classification), or one that the reward function asks (generation)."""

    enable: bool = key(False, "serve a reward model")
    enable_resource_pool: bool = key(
        False,
        "the reward model has devices of its own (n_gpus_per_node, nnodes); it cannot share those of the trainer, so "
        "enable=True needs True",
    )
    n_gpus_per_node: int = key(
        8, "devices of the reward model on each of its nodes", unit="devices", at_least=1, only_with=_OWN_DEVICES
    )
    nnodes: int = key(
        0,
        "nodes of the reward model's engines, with n_gpus_per_node devices each of their own",
        at_least=0,
        only_with=_OWN_DEVICES,
    )
    model_path: str | None = key(
        None,
        "directory or hub name of the reward model: a sequence classifier with one label scores each response itself; "
        "reward.custom_reward_function asks a generative model",
        path=True,
        hub=True,
    )
    rollout: RewardModelEngineConfig = section(RewardModelEngineConfig, "the engines of the reward model")
