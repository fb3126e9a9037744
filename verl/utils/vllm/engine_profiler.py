"""Traces of a rollout engine by vLLM's torch profiler: one file per worker, in a directory per replica."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol


class RolloutProfileSettings(Protocol):
    """Settings of all replicas; see `verl.config.profiles.RolloutProfiles`."""

    @property
    def save_path(self) -> str: ...
    @property
    def replicas(self) -> frozenset[int]: ...
    @property
    def contents(self) -> tuple[str, ...]: ...
    @property
    def first(self) -> int | None: ...
    @property
    def last(self) -> int | None: ...
    @property
    def relocate(self) -> bool: ...


def engine_profiler(settings: RolloutProfileSettings, replica: int) -> EngineProfiler | None:
    """Return the profiler of a replica; None if the replica is not profiled."""
    return EngineProfiler(settings, replica) if replica in settings.replicas else None


def engine_objects(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of `AsyncEngineArgs` with vLLM's own class for those that vLLM takes only as an object."""
    given = arguments.get("profiler_config")
    if not isinstance(given, dict):
        return arguments
    from vllm.config import ProfilerConfig

    return {**arguments, "profiler_config": ProfilerConfig(**given)}


class EngineProfiler:
    """Starts and stops the profiler of one engine.

    Attributes:
        config: fields of vLLM's `ProfilerConfig`.
    """

    def __init__(self, settings: RolloutProfileSettings, replica: int):
        self._settings, self._replica, self._started = settings, replica, False
        first = settings.first or 0
        self._directory = Path(settings.save_path) / f"agent_loop_rollout_replica_{replica}"
        self.config: dict[str, Any] = {
            "profiler": "torch",
            "torch_profiler_dir": str(self._directory),
            "torch_profiler_with_stack": "stack" in settings.contents,
            "torch_profiler_with_memory": "memory" in settings.contents,
            "torch_profiler_record_shapes": "shapes" in settings.contents,
            "delay_iterations": first,
            "max_iterations": 0 if settings.last is None else settings.last - first,
            "ignore_frontend": True,  # it knows no iterations, and asyncio fills its trace
        }

    async def start(self, engine: Any, first_step: int) -> None:
        """Begin a trace with a training step."""
        await engine.start_profile(profile_prefix=f"step{first_step}")
        self._started = True

    async def stop(self, engine: Any) -> None:
        """End the trace, which the workers then write. No effect in an engine that was restarted in between."""
        if not self._started:
            return
        self._started = False
        await engine.stop_profile()
        if self._settings.relocate and self._directory.is_dir():
            for path in sorted(self._directory.iterdir()):
                os.replace(path, self._directory.parent / f"rollout-replica{self._replica}_{path.name}")
