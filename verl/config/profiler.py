"""`global_profiler` and the sections `profiler` of the roles: device profiles of chosen steps and ranks."""

# ruff: noqa: RUF009  (key, unsupported and section return dataclass fields)
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from verl.config.conditions import any_of, first_of, same_as, when
from verl.config.schema import Condition, ConfigSection, Run, key, section, show, unsupported, without_effect

TOOLS = ("torch", "npu", "torch_memory")
_TOOL, _STEPS = "global_profiler.tool", "global_profiler.steps"
_PRECISION = "the precision debugger of msprobe"
_HOOK = "a command after the last profiled step"


def _why_no_steps(run: Run, key: str) -> str | None:
    return None if run.value(_STEPS) else f"without steps to profile ({_STEPS})"


def _why_profiled(run: Run, key: str) -> str | None:
    return f"with {_STEPS}={show(run.value(_STEPS))}" if run.value(_STEPS) else None


def _why_not_profiled(run: Run, key: str) -> str | None:
    return _why_no_steps(run, key) or (None if run.value(_TOOL) else f"without a profiler ({_TOOL})")


def _same(name: str, *, path: bool = False) -> Any:
    """Return a field whose value must be that of the same key of `global_profiler`; null is that value."""
    return key(
        None,
        f"must be global_profiler.{name}; null: its value",
        only=(None,),
        use=f"use global_profiler.{name}",
        path=path,
        same_if=any_of(same_as(f"global_profiler.{name}"), Condition(_why_profiled, lambda key: "no profiled steps")),
    )


profiles = Condition(_why_not_profiled, lambda key: f"`{_STEPS}` and `{_TOOL}`")
"""Condition of keys that only a run with profiled steps reads."""

_ENABLED = first_of(profiles, when("enable"))
_PROFILES_ROLLOUT = first_of(
    profiles, when("run.profiles_rollout", words="a profiled rollout", reason="without a profile of the rollout")
)
_HAS_STEPS = Condition(_why_no_steps, lambda key: f"`{_STEPS}`")


@dataclass
class NsysConfig(ConfigSection):
    """NVIDIA Nsight Systems."""

    discrete: bool = without_effect(False, "the tool nsys is not supported")


@dataclass
class GlobalTorchMemoryConfig(ConfigSection):
    """Snapshots of the device's memory."""

    trace_alloc_max_entries: int = key(
        100_000, "newest allocations and releases that a rank keeps for a snapshot", at_least=1
    )
    stack_depth: int = without_effect(32, "torch decides the depth of the stacks itself")


@dataclass
class GlobalPrecisionDebuggerConfig(ConfigSection):
    """Precision debugger of msprobe."""

    config_path: str | None = unsupported(None, _PRECISION)
    stages: list[str] | None = unsupported(None, _PRECISION)
    strict: bool = unsupported(False, _PRECISION)


@dataclass
class GlobalToolConfig(ConfigSection):
    """Settings of the tools for all roles."""

    nsys: NsysConfig = section(NsysConfig, "NVIDIA Nsight Systems: not supported")
    torch_memory: GlobalTorchMemoryConfig = section(
        GlobalTorchMemoryConfig, "snapshots of the device's memory", only_with=when(_TOOL, "torch_memory")
    )
    precision_debugger: GlobalPrecisionDebuggerConfig = section(
        GlobalPrecisionDebuggerConfig, "precision debugger of msprobe: not supported"
    )


@dataclass
class GlobalProfilerConfig(ConfigSection):
    """Device profiles of chosen steps: tool, steps, and directory."""

    tool: str | None = key(
        None,
        "profiler; torch: torch.profiler; npu: torch_npu.profiler; torch_memory: snapshots of the device's memory; "
        "null: none",
        choices=(*TOOLS, None),
        unsupported=("nsys", "precision_debugger"),
        use="use torch, or npu on an NPU",
        only_with=_HAS_STEPS,
    )
    steps: list[int] | None = key(None, "training steps to profile, counted from 1; null or []: none", at_least=1)
    profile_continuous_steps: bool = key(
        False, "one profile for steps that follow each other, instead of one for each", only_with=profiles
    )
    save_path: str = key("outputs/profile", "directory of the profiles, on each host", path=True, only_with=profiles)
    relocate_results: bool = key(
        False,
        "move the engines' traces from agent_loop_rollout_replica_N into save_path itself when a profile ends",
        only_with=_PROFILES_ROLLOUT,
    )
    finish_hook_cmd: str | None = unsupported(None, _HOOK, "leave it out")
    finish_hook_all_ranks: bool = without_effect(False, "finish_hook_cmd is not supported")
    finish_hook_ranks: list[int] = without_effect([], "finish_hook_cmd is not supported")
    global_tool_config: GlobalToolConfig = section(
        GlobalToolConfig, "settings of the tools for all roles", only_with=profiles
    )


@dataclass
class ScheduleConfig(ConfigSection):
    """Choice of mini-batches within an update."""

    active: int = unsupported(0, "a choice of mini-batches", "use 0: an update is recorded as a whole")
    skip_first: int = without_effect(0, "schedule.active is 0")
    wait: int = without_effect(0, "schedule.active is 0")
    warmup: int = without_effect(0, "schedule.active is 0")
    repeat: int = without_effect(0, "schedule.active is 0")


@dataclass
class TorchToolConfig(ConfigSection):
    """Settings of torch.profiler."""

    contents: list[str] = key(
        [],
        "recorded data; []: cpu and cuda; cpu is always recorded, because it has the names of the stages",
        choices=("cpu", "cuda", "memory", "shapes", "stack"),
    )
    discrete: bool = key(False, "one trace for each call of a stage, instead of one for the whole step")
    schedule: ScheduleConfig = section(ScheduleConfig, "choice of mini-batches within an update: not supported")


@dataclass
class NpuToolConfig(ConfigSection):
    """Settings of torch_npu.profiler."""

    contents: list[str] = key(
        [],
        "recorded data; []: cpu and npu; cpu is always recorded, because it has the names of the stages",
        choices=("cpu", "npu", "memory", "shapes", "module", "stack"),
    )
    level: str = key(
        "level0",
        "detail of the device's data; each level contains the ones before",
        choices=("level_none", "level0", "level1", "level2"),
    )
    analysis: bool = key(True, "parse the data when a profile ends; otherwise torch_npu.profiler can do it later")
    discrete: bool = key(False, "one profile for each call of a stage, instead of one for the whole step")


@dataclass
class TorchMemoryToolConfig(ConfigSection):
    """Snapshots of the device's memory; the values are those of global_profiler.global_tool_config.torch_memory."""

    trace_alloc_max_entries: int | None = unsupported(
        None,
        "a value for one role",
        "use global_profiler.global_tool_config.torch_memory.trace_alloc_max_entries",
        same_if=same_as("global_profiler.global_tool_config.torch_memory.trace_alloc_max_entries"),
    )
    stack_depth: int | None = without_effect(None, "torch decides the depth of the stacks itself")


@dataclass
class PrecisionDebuggerConfig(GlobalPrecisionDebuggerConfig):
    """Precision debugger of msprobe for one role."""

    steps: list[int] | None = unsupported(None, _PRECISION)


@dataclass
class ToolConfig(ConfigSection):
    """Settings of each tool."""

    torch: TorchToolConfig = section(TorchToolConfig, "torch.profiler", only_with=when(_TOOL, "torch"))
    npu: NpuToolConfig = section(NpuToolConfig, "torch_npu.profiler", only_with=when(_TOOL, "npu"))
    nsys: NsysConfig = section(NsysConfig, "NVIDIA Nsight Systems: not supported")
    torch_memory: TorchMemoryToolConfig = section(
        TorchMemoryToolConfig, "snapshots of the device's memory", only_with=when(_TOOL, "torch_memory")
    )
    precision_debugger: PrecisionDebuggerConfig = section(
        PrecisionDebuggerConfig, "precision debugger of msprobe: not supported"
    )


@dataclass
class RoleProfilerConfig(ConfigSection):
    """Profile of a role of the trainer: whether, and of which ranks."""

    enable: bool = key(False, "profile the stages of this role", only_with=profiles)
    all_ranks: bool = key(False, "profile all ranks", only_with=_ENABLED)
    ranks: list[int] = key(
        [], "trainer ranks to profile; []: rank 0", at_least=0, only_with=first_of(_ENABLED, when("all_ranks", False))
    )
    tool: str | None = _same("tool")
    save_path: str | None = _same("save_path", path=True)
    relocate_results: bool | None = _same("relocate_results")
    finish_hook_cmd: str | None = unsupported(None, _HOOK, "leave it out")
    finish_hook_all_ranks: bool = without_effect(False, "finish_hook_cmd is not supported")
    finish_hook_ranks: list[int] = without_effect([], "finish_hook_cmd is not supported")
    tool_config: ToolConfig = section(
        ToolConfig, "settings of each tool, the same for all profiled roles", only_with=_ENABLED
    )


@dataclass
class RolloutTorchToolConfig(ConfigSection):
    """Settings of the engine's torch.profiler."""

    contents: list[str] | None = key(
        None,
        "recorded data; cpu and, on a GPU, cuda are always recorded; null: the actor's",
        choices=("cpu", "cuda", "memory", "shapes", "stack"),
    )
    discrete: bool | None = without_effect(None, "a replica always writes files of its own")
    profile_token_start: int | None = key(
        None, "number of engine steps before the trace begins, in each profile", at_least=0
    )
    profile_token_end: int | None = key(
        None, "engine step with which the trace ends; null: the end of the profile", at_least=1
    )


@dataclass
class RolloutToolConfig(ConfigSection):
    """Settings of each tool."""

    torch: RolloutTorchToolConfig = section(RolloutTorchToolConfig, "torch.profiler")


@dataclass
class RolloutProfilerConfig(ConfigSection):
    """Profile of the rollout engines, by vLLM's own profiler."""

    enable: bool | None = key(
        None,
        "profile engines, with the tool torch on a CPU or a GPU; null: as the actor, if its tool_config.torch.discrete "
        "is True",
        only_with=profiles,
    )
    all_ranks: bool | None = key(None, "profile all replicas; null: the actor's value", only_with=_PROFILES_ROLLOUT)
    ranks: list[int] | None = key(
        None,
        "devices whose replicas are profiled, all replicas counted one after another; []: 0; null: the actor's value",
        at_least=0,
        only_with=_PROFILES_ROLLOUT,
    )
    tool: str | None = _same("tool")
    save_path: str | None = _same("save_path", path=True)
    relocate_results: bool | None = _same("relocate_results")
    finish_hook_cmd: str | None = unsupported(None, _HOOK, "leave it out")
    finish_hook_all_ranks: bool = without_effect(False, "finish_hook_cmd is not supported")
    finish_hook_ranks: list[int] = without_effect([], "finish_hook_cmd is not supported")
    tool_config: RolloutToolConfig = section(RolloutToolConfig, "settings of each tool", only_with=_PROFILES_ROLLOUT)
