"""Checks of `global_profiler` and the sections `profiler`: the tool on this device, the ranks, the roles' agreement."""

from __future__ import annotations

import importlib.util

from verl.config.ppo import PPOConfig
from verl.config.profiles import profiled_roles, profiled_steps, profiles_rollout, tool_settings
from verl.preflight.findings import Findings
from verl.preflight.placement import trainer_ranks
from verl.preflight.target import Target

_SECTIONS = {"actor": "actor_rollout_ref.actor", "ref": "actor_rollout_ref.ref", "critic": "critic"}
_ROLLOUT = "actor_rollout_ref.rollout"
_TOOL = "global_profiler.tool"


def check_profiler(config: PPOConfig, device: str, target: Target, found: Findings) -> None:
    """Check the profiles of a run that has any.

    Args:
        device: `cpu`, `cuda` or `npu`.
    """
    if not profiled_steps(config):
        return
    roles = profiled_roles(config)
    if not roles and not profiles_rollout(config):
        found.warnings.append(
            "global_profiler.steps: no role of this run is profiled; set actor_rollout_ref.actor.profiler.enable=True, "
            "or leave the steps out"
        )
    _check_tool(config, device, target, found)
    count = trainer_ranks(config)
    for role, section in roles.items():
        beyond = [rank for rank in section.ranks if rank >= count]
        if beyond and not section.all_ranks:
            found.errors.append(
                f"{_SECTIONS[role]}.profiler.ranks: rank {beyond[0]} does not exist, the trainer has {count} rank(s), "
                f"counted from 0; use at most {count - 1}"
            )
    settings = {role: tool_settings(config, section) for role, section in roles.items()}
    first, *others = settings or [""]
    for role in others:
        if settings[role] != settings[first]:
            found.errors.append(
                f"{_SECTIONS[role]}.profiler.tool_config.{config.global_profiler.tool} differs from that of "
                f"{_SECTIONS[first]}: a rank has one profiler for all its roles; give both the same values"
            )
    chosen = settings.get(first)
    if config.global_profiler.profile_continuous_steps and chosen is not None and chosen.discrete:
        found.errors.append(
            f"global_profiler.profile_continuous_steps=True with {_SECTIONS[first]}.profiler.tool_config."
            f"{config.global_profiler.tool}.discrete=True: each call of a stage would have a profile of its own; use "
            "False for one of the two"
        )
    if profiles_rollout(config):
        _check_rollout(config, found)


def _check_tool(config: PPOConfig, device: str, target: Target, found: Findings) -> None:
    tool = config.global_profiler.tool
    if tool == "npu" and device != "npu":
        found.errors.append(f"{_TOOL}=npu: this run is on {device}; use torch")
    elif tool == "npu" and target.hardware is None and importlib.util.find_spec("torch_npu") is None:
        found.errors.append(f"{_TOOL}=npu: torch_npu is not installed; install it, or use torch")
    elif tool == "torch" and device == "npu":
        found.warnings.append(f"{_TOOL}=torch: it records only the host's side of an NPU; use npu for its kernels")
    elif tool == "torch_memory" and device == "cpu":
        found.errors.append(f"{_TOOL}=torch_memory: a CPU's memory has no history; use an accelerator, or torch")


def _check_rollout(config: PPOConfig, found: Findings) -> None:
    rollout, tool = config.actor_rollout_ref.rollout, config.global_profiler.tool
    if tool != "torch":
        found.errors.append(
            f"{_ROLLOUT}.profiler.enable=True with {_TOOL}={tool}: engines are profiled with torch only; use False"
        )
    settings = rollout.profiler.tool_config.torch
    first, last = settings.profile_token_start or 0, settings.profile_token_end
    if last is not None and last <= first:
        found.errors.append(
            f"{_ROLLOUT}.profiler.tool_config.torch.profile_token_end={last}: must be above profile_token_start={first}"
        )
    if "profiler_config" in (rollout.engine_kwargs.get("vllm") or {}):
        found.errors.append(
            f"{_ROLLOUT}.engine_kwargs.vllm.profiler_config: {_ROLLOUT}.profiler sets it; remove one of the two"
        )
