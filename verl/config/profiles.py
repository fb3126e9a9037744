"""The profiles of a run, which `global_profiler` and the sections `profiler` of the roles decide together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from verl.config.ppo import PPOConfig
from verl.config.profiler import NpuToolConfig, RoleProfilerConfig, TorchToolConfig
from verl.config.roles import needs_critic, needs_ref


@dataclass(frozen=True)
class TrainerProfiles:
    """Profiles of the trainer's ranks.

    Attributes:
        tool: `torch`, `npu` or `torch_memory`.
        save_path: absolute path of their directory.
        ranks: profiled ranks by role: `actor`, `ref`, `critic`.
        contents: recorded data; empty: the tool's standard.
        discrete: one profile for each call of a stage.
        level, analysis: settings of `npu`.
        max_entries: allocations and releases in a snapshot of `torch_memory`.
    """

    tool: str
    save_path: str
    ranks: Mapping[str, frozenset[int]]
    contents: tuple[str, ...] = ()
    discrete: bool = False
    level: str = "level0"
    analysis: bool = True
    max_entries: int = 100_000


@dataclass(frozen=True)
class RolloutProfiles:
    """Profiles of the rollout engines.

    Attributes:
        save_path: absolute path of their directory.
        replicas: profiled replicas.
        contents: recorded data besides the activities.
        first, last: bounds of the trace in engine steps of a profile; None: no bound.
        relocate: move finished traces into `save_path` itself.
    """

    save_path: str
    replicas: frozenset[int]
    contents: tuple[str, ...]
    first: int | None
    last: int | None
    relocate: bool


def profiled_steps(config: PPOConfig) -> frozenset[int]:
    """Return the steps to profile; empty without a tool."""
    profiler = config.global_profiler
    return frozenset(profiler.steps or ()) if profiler.tool is not None else frozenset()


def profiled_roles(config: PPOConfig) -> dict[str, RoleProfilerConfig]:
    """Return the sections of the trainer's roles that are profiled and part of the run, by role."""
    roles = config.actor_rollout_ref
    sections = {"actor": roles.actor.profiler}
    if needs_ref(config):
        sections["ref"] = roles.ref.profiler
    if needs_critic(config):
        sections["critic"] = config.critic.profiler
    return {role: section for role, section in sections.items() if section.enable}


def tool_settings(config: PPOConfig, section: RoleProfilerConfig) -> TorchToolConfig | NpuToolConfig | None:
    """Return a role's settings of the run's tool; None if the tool has no settings for a role."""
    tools: dict[str, TorchToolConfig | NpuToolConfig] = {
        "torch": section.tool_config.torch,
        "npu": section.tool_config.npu,
    }
    return tools.get(config.global_profiler.tool or "")


def trainer_profiles(config: PPOConfig) -> TrainerProfiles | None:
    """Return the profiles of the trainer's ranks; None without any."""
    profiler, sections = config.global_profiler, profiled_roles(config)
    if not profiled_steps(config) or not sections:
        return None
    assert profiler.tool is not None, "there are steps to profile"
    count = config.trainer.n_gpus_per_node * config.trainer.nnodes
    # Preflight checks that all profiled roles have the same settings.
    settings = tool_settings(config, next(iter(sections.values())))
    return TrainerProfiles(
        tool=profiler.tool,
        save_path=profiler.save_path,
        ranks={
            role: frozenset(range(count) if section.all_ranks else section.ranks or [0])
            for role, section in sections.items()
        },
        contents=() if settings is None else tuple(settings.contents),
        discrete=settings is not None and settings.discrete,
        level=settings.level if isinstance(settings, NpuToolConfig) else "level0",
        analysis=not isinstance(settings, NpuToolConfig) or settings.analysis,
        max_entries=profiler.global_tool_config.torch_memory.trace_alloc_max_entries,
    )


def profiles_rollout(config: PPOConfig) -> bool:
    """Return True if the rollout engines are profiled."""
    rollout, actor = config.actor_rollout_ref.rollout.profiler, config.actor_rollout_ref.actor.profiler
    if not profiled_steps(config):
        return False
    if rollout.enable is None:
        return config.global_profiler.tool == "torch" and actor.enable and actor.tool_config.torch.discrete
    return rollout.enable


def rollout_profiles(config: PPOConfig, replicas: int) -> RolloutProfiles | None:
    """Return the profiles of the rollout engines; None without any.

    Args:
        replicas: number of replicas.
    """
    if not profiles_rollout(config):
        return None
    rollout, actor = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor
    section, settings = rollout.profiler, rollout.profiler.tool_config.torch
    every = actor.profiler.all_ranks if section.all_ranks is None else section.all_ranks
    ranks = actor.profiler.ranks if section.ranks is None else section.ranks
    chosen = {rank // rollout.tensor_model_parallel_size for rank in ranks or [0]}
    contents = actor.profiler.tool_config.torch.contents if settings.contents is None else settings.contents
    return RolloutProfiles(
        save_path=config.global_profiler.save_path,
        replicas=frozenset(range(replicas) if every else chosen),
        contents=tuple(contents),
        first=settings.profile_token_start,
        last=settings.profile_token_end,
        relocate=config.global_profiler.relocate_results,
    )
