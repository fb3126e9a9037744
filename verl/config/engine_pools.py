"""The models beside the policy that engines with fixed weights serve: the teacher and the reward model."""

from __future__ import annotations

from dataclasses import dataclass

from verl.config.fixed_engine import FixedEngineConfig
from verl.config.ppo import PPOConfig


@dataclass(frozen=True)
class EnginePool:
    """Engines that serve one model on devices of their own.

    Attributes:
        model: the model's name for a user: teacher, reward model.
        switch: key that turns the model on.
        section: config section with `nnodes` and `n_gpus_per_node`.
        engine_section: config section of `engine`.
        path_key, path: key and value of the model's directory; the value may be None before the checks.
        nodes, devices_per_node: the devices.
        engine: keys of the engines.
        dtype: dtype of the engines, as the keys give it.
        prompt_length, response_length: limits of a request, in tokens.
    """

    model: str
    switch: str
    section: str
    engine_section: str
    path_key: str
    path: str | None
    nodes: int
    devices_per_node: int
    engine: FixedEngineConfig
    dtype: str
    prompt_length: int
    response_length: int

    @property
    def engines(self) -> int:
        """Number of engines."""
        return self.devices_per_node * self.nodes // self.engine.tensor_model_parallel_size

    @property
    def request_tokens(self) -> int:
        """Maximum length of a request with its reply."""
        return self.engine.max_model_len or self.prompt_length + self.response_length

    @property
    def summary(self) -> str:
        """Number and size of the engines, as text."""
        return f"{self.engines} engine(s) x {self.engine.tensor_model_parallel_size} tensor parallel"


def teacher_pool(config: PPOConfig) -> EnginePool | None:
    """Return the engines of the teacher; None without distillation."""
    section, data = config.distillation, config.data
    if not section.enabled:
        return None
    inference, keys = section.teacher.inference, "distillation.teacher_models.teacher_model"
    return EnginePool(
        model="teacher",
        switch="distillation.enabled",
        section="distillation",
        engine_section=f"{keys}.inference",
        path_key=f"{keys}.model_path",
        path=section.teacher.model_path,
        nodes=section.nnodes,
        devices_per_node=section.n_gpus_per_node,
        engine=inference,
        dtype=inference.dtype or config.actor_rollout_ref.rollout.dtype,
        prompt_length=data.max_prompt_length + data.max_response_length,
        response_length=1,  # vLLM generates at least one token
    )


def reward_model_pool(config: PPOConfig) -> EnginePool | None:
    """Return the engines of the reward model; None without one."""
    section, keys = config.reward.reward_model, "reward.reward_model"
    if not section.enable:
        return None
    return EnginePool(
        model="reward model",
        switch="reward.reward_model.enable",
        section=keys,
        engine_section=f"{keys}.rollout",
        path_key=f"{keys}.model_path",
        path=section.model_path,
        nodes=section.nnodes,
        devices_per_node=section.n_gpus_per_node,
        engine=section.rollout,
        dtype=section.rollout.dtype or config.actor_rollout_ref.rollout.dtype,
        prompt_length=section.rollout.prompt_length,
        response_length=section.rollout.response_length,
    )


def engine_pools(config: PPOConfig) -> list[EnginePool]:
    """Return the engines of every model beside the policy."""
    return [pool for pool in (teacher_pool(config), reward_model_pool(config)) if pool is not None]
