"""Checkpoints on disk as a transaction: a `global_step_N` directory is whole, or it is not there.

    ROOT/global_step_N.tmp-PID      being written (or being deleted) by process PID
    ROOT/global_step_N.old-PID      for a moment, while the same step is replaced
    ROOT/global_step_N              published: flushed to the disk, then renamed
    ROOT/global_step_N/manifest.json        relative path and size in bytes of each file in it
    ROOT/latest_checkpointed_iteration.txt  the step to go on from; written last

A SIGKILL or a power cut between any two system calls leaves a directory from which `CheckpointStore.latest` finds a
whole checkpoint. One run at a time writes to a root. No Ray here, and torch only where tensors are stored.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from verl.utils.atomic_io import atomic_write_text, fsync_path

logger = logging.getLogger(__name__)

TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
DRIVER_STATE = "data.pt"
RESUME_MODES = ("auto", "disable", "resume_path")
_PUBLISHED = re.compile(r"global_step_(\d+)")
_UNFINISHED = re.compile(rf"(?P<name>global_step_\d+|\.{re.escape(TRACKER)})\.(?P<kind>tmp|old)-(?P<pid>\d+)")

# Temporary directories of this process, so that a second store on the same root leaves them alone.
_BEING_WRITTEN: set[Path] = set()


class CheckpointError(OSError):
    """A checkpoint could not be written or read; the message names the path, the cause and what is still usable."""


def step_of(path: str | Path) -> int:
    """The step of a `global_step_N` directory.

    Raises:
        ValueError: the name is another one.
    """
    match = _PUBLISHED.fullmatch(Path(path).name)
    if match is None:
        raise ValueError(f"{path}: not a checkpoint; give a directory named global_step_N")
    return int(match[1])


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a published checkpoint: a file of its manifest is missing or has another size; None if whole.

    A checkpoint without a manifest (made elsewhere) is taken for whole.
    """
    if not checkpoint.is_dir():
        return f"{checkpoint} is not a directory"
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8")).items()
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError):
        return f"{checkpoint / MANIFEST} is damaged"
    for name, size in sizes:
        file = checkpoint / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size} bytes instead of {size}"
    return None


class CheckpointStore:
    """The checkpoints of one run.

    Opening a store clears away what dead processes left half-written.

    Args:
        root: `trainer.default_local_dir`; made at the first save.
        max_to_keep: how many checkpoints to keep, counting the newest; None keeps all. Checkpoints of later steps than
            the one just saved (another branch of the run) are neither counted nor deleted.

    Raises:
        ValueError: `max_to_keep` is below 1.

    Example:
        >>> store = CheckpointStore(Path("checkpoints/run"), max_to_keep=2)
        >>> with store.writing(step=10) as directory:
        ...     engine.save(directory / "actor")
        ...     save_driver_state(directory, {"dataloader": loader.state_dict()})
        >>> store.latest()  # checkpoints/run/global_step_10
    """

    def __init__(self, root: str | Path, max_to_keep: int | None = None):
        if max_to_keep is not None and max_to_keep < 1:
            raise ValueError(
                f"trainer.max_actor_ckpt_to_keep={max_to_keep}: must be at least 1, or null to keep every checkpoint"
            )
        self.root = Path(root)
        self.max_to_keep = max_to_keep
        self._sweep()

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """Give a temporary directory to fill; at the end of the block it becomes `global_step_STEP`.

        The files may be written by other processes, of other hosts too where these share the file system; all of them
        must be done when the block ends. A checkpoint of the same step is replaced. Then the tracker file is moved on
        and old checkpoints are deleted.

        Raises:
            CheckpointError: the block, or publishing its files, failed: disk full, a worker's error, ... The temporary
                directory is gone and the checkpoints from before are untouched. Ctrl-C and the like pass unchanged.
        """
        assert step >= 0, step
        published = self.root / f"global_step_{step}"
        temporary = published.with_name(f"{published.name}.tmp-{os.getpid()}")
        try:
            _BEING_WRITTEN.add(temporary.absolute())
            self._remove(temporary)
            temporary.mkdir(parents=True)
            yield temporary
            _flush(temporary)
            self._publish(temporary, published)
            atomic_write_text(self.root / TRACKER, str(step))
        except Exception as error:
            self._discard(temporary)
            raise self._failure(published, error) from error
        except BaseException:
            self._discard(temporary)
            raise
        finally:
            _BEING_WRITTEN.discard(temporary.absolute())
        self._prune(step)

    def latest(self) -> Path | None:
        """The checkpoint that the tracker file names; if missing or damaged the newest whole one, with a warning.

        Returns:
            an absolute path, or None if there is no whole checkpoint.
        """
        named = self._tracked()
        if named is not None:
            if (wrong := damage(named)) is None:
                return named.absolute()
            logger.warning("%s names %s, but %s", self.root / TRACKER, named.name, wrong)
        for checkpoint in reversed(self.checkpoints()):
            if checkpoint == named:
                continue
            if (wrong := damage(checkpoint)) is not None:
                logger.warning("%s is passed over: %s", checkpoint, wrong)
                continue
            logger.warning("%s does not name a whole checkpoint; using %s", self.root / TRACKER, checkpoint)
            return checkpoint.absolute()
        return None

    def checkpoints(self) -> list[Path]:
        """The published checkpoints, in order of steps."""
        if not self.root.is_dir():
            return []
        found = [path for path in self.root.iterdir() if _PUBLISHED.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=step_of)

    def resolve(self, resume_mode: str, resume_from_path: str | Path | None = None) -> Path | None:
        """The checkpoint to go on from, or None to start afresh.

        Args:
            resume_mode: `auto` (the latest one, if any), `disable`, or `resume_path` (`resume_from_path`, which may lie
                in another root).
            resume_from_path: a `global_step_N` directory, relative to the working directory if not absolute.

        Raises:
            ValueError: another mode; no path, or one that is not a `global_step_N` directory.
            FileNotFoundError: the path does not exist.
            CheckpointError: the checkpoint is damaged.
        """
        if resume_mode not in RESUME_MODES:
            raise ValueError(f"trainer.resume_mode={resume_mode!r}: must be one of {list(RESUME_MODES)}")
        if resume_mode == "disable":
            return None
        if resume_mode == "auto":
            return self.latest()
        if not resume_from_path:
            raise ValueError(
                "trainer.resume_from_path is not set; resume_mode=resume_path needs it: give a global_step_N directory"
            )
        path = Path(resume_from_path).absolute()
        if not path.exists():
            raise FileNotFoundError(f"trainer.resume_from_path={resume_from_path}: {path} does not exist")
        try:
            step_of(path)
        except ValueError as error:
            raise ValueError(f"trainer.resume_from_path={error}") from None
        if (wrong := damage(path)) is not None:
            raise CheckpointError(f"trainer.resume_from_path={resume_from_path}: {wrong}; choose another checkpoint")
        return path

    def _tracked(self) -> Path | None:
        """The directory that the tracker file names, existing or not."""
        try:
            text = (self.root / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not text.isascii() or not text.isdigit():
            logger.warning("%s holds %r instead of a step", self.root / TRACKER, text[:80])
            return None
        return self.root / f"global_step_{int(text)}"

    def _publish(self, temporary: Path, published: Path) -> None:
        aside = None
        if published.exists():
            # rename(2) cannot replace a directory that has entries; _sweep puts `aside` back after a kill in between.
            aside = published.with_name(f"{published.name}.old-{os.getpid()}")
            self._remove(aside)
            os.rename(published, aside)
        try:
            os.rename(temporary, published)
        except OSError:
            if aside is not None:
                os.rename(aside, published)
            raise
        fsync_path(self.root)
        fsync_path(self.root.absolute().parent)
        if aside is not None:
            self._discard(aside)

    def _prune(self, saved_step: int) -> None:
        if self.max_to_keep is None:
            return
        older = [path for path in self.checkpoints() if step_of(path) < saved_step]
        for path in older[: max(0, len(older) - (self.max_to_keep - 1))]:
            # Renamed first: a kill while it is deleted must not leave a part that looks whole.
            doomed = path.with_name(f"{path.name}.tmp-{os.getpid()}")
            try:
                os.rename(path, doomed)
            except OSError as error:
                logger.warning("%s is kept: it cannot be deleted (%s)", path, error)
                continue
            self._discard(doomed)

    def _sweep(self) -> None:
        """Undo or finish what a process that no longer runs was doing."""
        if not self.root.is_dir():
            return
        for path in sorted(self.root.iterdir()):
            match = _UNFINISHED.fullmatch(path.name)
            if match is None or path.absolute() in _BEING_WRITTEN or _runs_elsewhere(int(match["pid"])):
                continue
            published = path.with_name(match["name"])
            if match["kind"] == "old" and not published.exists():
                logger.warning("%s: its replacement was never finished; putting it back", published)
                os.rename(path, published)
                fsync_path(self.root)
            else:
                logger.info("removing %s, left by a process that no longer runs", path)
                self._discard(path)

    def _remove(self, path: Path) -> None:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def _discard(self, path: Path) -> None:
        """Remove what nobody needs; what cannot be removed is left to the next run's sweep."""
        try:
            self._remove(path)
        except OSError as error:
            logger.warning("%s cannot be removed (%s); delete it by hand", path, error)

    def _failure(self, published: Path, error: Exception) -> CheckpointError:
        usable = self.latest()
        left = f"{usable} stays usable" if usable is not None else "there is no earlier checkpoint"
        existing = next(path for path in (self.root.absolute(), *self.root.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        text = (
            f"{published} was not saved: {type(error).__name__}: {error}; {free} bytes are free on its disk; {left}. "
            "Make room or choose another trainer.default_local_dir, then start again"
        )
        number = error.errno if isinstance(error, OSError) else None
        return CheckpointError(text) if number is None else CheckpointError(number, text)


def _flush(directory: Path) -> None:
    """Write the manifest, then bring every file and directory below `directory` to the disk."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    sizes = {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}
    (directory / MANIFEST).write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    for parent, _, names in os.walk(directory, topdown=False):
        for name in names:
            fsync_path(Path(parent, name))
        fsync_path(parent)


def _runs_elsewhere(pid: int) -> bool:
    """Whether another process with that id runs on this host.

    This process does not count: what it is writing is in `_BEING_WRITTEN`, so any other directory with its id comes
    from a dead process that had the same one (a container starts counting anew).
    """
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def save_driver_state(directory: str | Path, state: dict[str, Any]) -> Path:
    """Store the driver's state (data loader, step, ...) as DIRECTORY/data.pt and return that path.

    Args:
        directory: that of the checkpoint being written.
        state: nested dicts, lists and tuples of numbers, text, None and tensors.

    Raises:
        ValueError: something in it could not be loaded again without running code; said now rather than at the resume.
    """
    import torch

    path = Path(directory) / DRIVER_STATE
    torch.save(state, path)
    try:
        load_driver_state(directory)
    except CheckpointError as error:
        raise ValueError(
            f"driver state {list(state)}: only dicts, lists, tuples, numbers, text and tensors can be stored ({error})"
        ) from error
    return path


def load_driver_state(directory: str | Path) -> dict[str, Any]:
    """The state that `save_driver_state` stored; nothing in the file is executed.

    Raises:
        CheckpointError: the file is missing, damaged, or holds more than plain data.
    """
    import torch

    path = Path(directory) / DRIVER_STATE
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler meets damaged bytes with nearly any exception
        raise CheckpointError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
