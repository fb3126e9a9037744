"""Device profiles of a trainer rank: torch.profiler, torch_npu.profiler, or snapshots of the device's memory.

    install_profiler(settings, rank, world_size, "cuda")    # once per process
    start_profile(3); ...; stop_profile(3)                  # around a profiled step

    @profiled("actor_update", "actor")                      # a stage; no effect outside a profiled step
    def update_actor(...): ...

torch.profiler knows only one profile per process, and actor, reference model and critic of a rank share one. So there
is one profiler per process, too. A profile of a whole step contains everything that the process does in it. With
`discrete`, each call of a stage has its own profile, if the role of the stage is profiled on this rank.

Files are complete as soon as they have their names: they are written under another name first, apart from those of
torch_npu, which has its own directory for each profile.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from verl.utils.atomic_io import atomic_file

_NPU_LEVELS = {"level_none": "Level_none", "level0": "Level0", "level1": "Level1", "level2": "Level2"}
_profiler: RankProfiler | None = None


class ProfilerSettings(Protocol):
    """Settings of the profiles of all ranks; see `verl.config.profiles.TrainerProfiles`."""

    @property
    def tool(self) -> str: ...
    @property
    def save_path(self) -> str: ...
    @property
    def ranks(self) -> Mapping[str, frozenset[int]]: ...
    @property
    def contents(self) -> tuple[str, ...]: ...
    @property
    def discrete(self) -> bool: ...
    @property
    def level(self) -> str: ...
    @property
    def analysis(self) -> bool: ...
    @property
    def max_entries(self) -> int: ...


class Profile(Protocol):
    """One profile, from its construction to `stop`."""

    def mark(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """Return a context manager whose block has this name in the profile."""

    def stop(self) -> None:
        """End the profile and write it."""


def install_profiler(settings: ProfilerSettings | None, rank: int, world_size: int, device: str) -> None:
    """Set the profiler of this process; none without settings, or if they profile no role on this rank.

    Call it before the models are loaded: `torch_memory` knows the stacks only of later allocations.

    Args:
        device: `cpu`, `cuda` or `npu`.
    """
    global _profiler
    roles = frozenset() if settings is None else frozenset(r for r, ranks in settings.ranks.items() if rank in ranks)
    _profiler = RankProfiler(settings, roles, rank, world_size, device) if settings is not None and roles else None


def start_profile(first_step: int, last_step: int) -> None:
    """Begin a profile, which will end with training step `last_step`; no effect if this rank is not profiled."""
    if _profiler is not None:
        _profiler.start(first_step, last_step)


def stop_profile() -> None:
    """End the profile and write it."""
    if _profiler is not None:
        _profiler.stop()


@contextmanager
def profiled(stage: str, role: str) -> Iterator[None]:
    """Show the block, or each call of a decorated function, as a stage of a role.

    Args:
        stage: name in the profile.
        role: `actor`, `ref` or `critic`.
    """
    if _profiler is None:
        yield
        return
    with _profiler.stage(stage, role):
        yield


@contextmanager
def profile_mark(name: str) -> Iterator[None]:
    """Show the block within the stage in which it runs."""
    if _profiler is None:
        yield
        return
    with _profiler.mark(name):
        yield


class RankProfiler:
    """The profiler of one rank.

    Args:
        settings: settings of the run.
        roles: roles that are profiled on this rank.
        rank, world_size, device: of this process.
    """

    def __init__(self, settings: ProfilerSettings, roles: frozenset[str], rank: int, world_size: int, device: str):
        self._settings, self._roles, self._device = settings, roles, device
        self._suffix = f"rank{rank}-of-{world_size}"
        self._steps: str | None = None
        self._calls = itertools.count(1)
        self._current: Profile | None = None
        if settings.tool == "torch_memory":
            record_memory_history(device, settings.max_entries)

    def start(self, first_step: int, last_step: int) -> None:
        """See `start_profile`."""
        assert self._steps is None, "stop the profile before the next one"
        self._steps = f"step{first_step}" + (f"-{last_step}" if last_step > first_step else "")
        self._calls = itertools.count(1)
        if self._settings.tool == "torch_memory" or not self._settings.discrete:
            self._current = self._begin(f"train_{self._steps}_{self._suffix}")

    def stop(self) -> None:
        """See `stop_profile`."""
        profile, self._steps, self._current = self._current, None, None
        if profile is not None:
            profile.stop()

    @contextmanager
    def stage(self, stage: str, role: str) -> Iterator[None]:
        """See `profiled`. In a profile of a whole step, and inside another stage, it is a mark."""
        if self._steps is None or self._current is not None or role not in self._roles:
            with self.mark(stage):
                yield
            return
        profile = self._current = self._begin(f"{stage}_{self._steps}_call{next(self._calls)}_{self._suffix}")
        try:
            with profile.mark(stage):
                yield
        finally:
            self._current = None
            profile.stop()

    @contextmanager
    def mark(self, name: str) -> Iterator[None]:
        """See `profile_mark`."""
        if self._current is None:
            yield
            return
        with self._current.mark(name):
            yield

    def _begin(self, name: str) -> Profile:
        settings, directory = self._settings, Path(self._settings.save_path)
        directory.mkdir(parents=True, exist_ok=True)
        if settings.tool == "npu":
            return NpuProfile(name, directory, settings)
        if settings.tool == "torch_memory":
            return MemoryProfile(name, directory, self._device, settings.max_entries)
        return TorchProfile(name, directory, settings.contents, self._device)


class TorchProfile:
    """A trace of torch.profiler: `NAME.json.gz` in the trace event format."""

    def __init__(self, name: str, directory: Path, contents: tuple[str, ...], device: str):
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device == "cuda" and (not contents or "cuda" in contents):
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._path = directory / f"{_unique(name)}.json.gz"
        self._profile = torch.profiler.profile(
            activities=activities,
            record_shapes="shapes" in contents,
            profile_memory="memory" in contents,
            with_stack="stack" in contents,
        )
        self._profile.start()

    def mark(self, name: str) -> contextlib.AbstractContextManager[Any]:
        return torch.profiler.record_function(name)

    def stop(self) -> None:
        self._profile.stop()
        with tempfile.TemporaryDirectory(dir=self._path.parent, prefix=".") as directory:
            plain = Path(directory) / "trace.json"
            self._profile.export_chrome_trace(str(plain))
            with (
                plain.open("rb") as source,
                atomic_file(self._path) as temporary,
                gzip.open(temporary, "wb", compresslevel=3) as compressed,
            ):
                shutil.copyfileobj(source, compressed)


class NpuProfile:
    """A profile of torch_npu.profiler: the directory `NAME_PID_TIME_ascend_pt`, which MindStudio Insight opens."""

    def __init__(self, name: str, directory: Path, settings: ProfilerSettings):
        import torch_npu

        profiler, contents = torch_npu.profiler, settings.contents
        activities = [profiler.ProfilerActivity.CPU]
        if not contents or "npu" in contents:
            activities.append(profiler.ProfilerActivity.NPU)
        self._mstx = torch_npu.npu.mstx
        self._profile = profiler.profile(
            activities=activities,
            record_shapes="shapes" in contents,
            profile_memory="memory" in contents,
            with_stack="stack" in contents,
            with_modules="module" in contents,
            on_trace_ready=profiler.tensorboard_trace_handler(
                str(directory), worker_name=name, analyse_flag=settings.analysis
            ),
            experimental_config=profiler._ExperimentalConfig(
                profiler_level=getattr(profiler.ProfilerLevel, _NPU_LEVELS[settings.level]),
                export_type=profiler.ExportType.Db,
                msprof_tx=True,  # without it the profile has no marks
            ),
        )
        self._profile.start()

    @contextmanager
    def mark(self, name: str) -> Iterator[None]:
        range_id = self._mstx.range_start(name)
        try:
            yield
        finally:
            self._mstx.range_end(range_id)

    def stop(self) -> None:
        self._profile.stop()


class MemoryProfile:
    """A snapshot of the device's memory, with the last allocations: `NAME.pickle` for pytorch.org/memory_viz.

    The history begins when the profiler is installed, and again after each snapshot.
    """

    def __init__(self, name: str, directory: Path, device: str, max_entries: int):
        self._path = directory / f"{_unique(name)}.pickle"
        self._device, self._max_entries = device, max_entries

    def mark(self, name: str) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def stop(self) -> None:
        memory = torch.get_device_module(self._device).memory
        with atomic_file(self._path) as temporary:
            temporary.write_bytes(pickle.dumps(memory._snapshot()))
        memory._record_memory_history(enabled=None)
        record_memory_history(self._device, self._max_entries)


def record_memory_history(device: str, max_entries: int) -> None:
    """Let the allocator of a device keep its last `max_entries` allocations and releases with their stacks."""
    torch.get_device_module(device).memory._record_memory_history(max_entries=max_entries)


def _unique(name: str) -> str:
    """Return the name with this process and the time, so that a second run overwrites nothing."""
    return f"{name}_pid{os.getpid()}_{time.strftime('%Y%m%d%H%M%S')}"
