"""Transactional checkpoints: a `global_step_N` directory is complete, or it does not exist.

    ROOT/global_step_N.tmp-PID      being written (or being deleted) by process PID
    ROOT/global_step_N.old-PID      exists briefly while the same step is replaced
    ROOT/global_step_N              published: flushed to the disk, then renamed
    ROOT/global_step_N/manifest.json        relative path, size in bytes and checksums of each file in it
    ROOT/latest_checkpointed_iteration.txt  the step to resume from; written last

After a SIGKILL or a power failure between any two system calls, `CheckpointStore.latest` still finds a complete
checkpoint. Only one run at a time may write to a root. This module imports no Ray, and torch only to store tensors.
"""

import errno
import io
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from verl.utils.atomic_io import atomic_write_text, fsync_path
from verl.utils.checkpoint_files import (
    DRIVER_STATE,
    TRACKER,
    find_damage,
    list_checkpoints,
    resume_candidates,
    step_of,
    write_manifest,
)

logger = logging.getLogger(__name__)

RESUME_MODES = ("auto", "disable", "resume_path")
_UNFINISHED = re.compile(rf"(?P<name>global_step_\d+|\.{re.escape(TRACKER)})\.(?P<kind>tmp|old)-(?P<pid>\d+)")

# Temporary directories of this process, which a second store on the same root must not remove.
_BEING_WRITTEN: set[Path] = set()


# Causes of a failed write by errno, and ways out.
_CAUSES = {
    errno.ENOSPC: ("no space is left", "Free disk space"),
    errno.EDQUOT: ("the quota of this user or project is used up", "Free disk space"),
    errno.EROFS: ("the file system is read-only", "Make it writable"),
    errno.EACCES: ("this user may not write there", "Change the permissions"),
    errno.EPERM: ("this user may not write there", "Change the permissions"),
    errno.EIO: ("the disk reports an input/output error", "Replace the disk"),
}
_PROBE_BYTES = 2**20


class CheckpointError(OSError):
    """A checkpoint could not be written or read; the message has the path, the cause and the last usable checkpoint.

    `errno` is None unless the operating system refused to write or read.
    """


class CheckpointStore:
    """The checkpoints of one run.

    Opening a store removes the unfinished directories of dead processes.

    Args:
        root: `trainer.default_local_dir`; created at the first save.
        max_to_keep: number of checkpoints to keep, the newest included; None keeps all. Checkpoints of steps after the
            one just saved (another branch of the run) are neither counted nor deleted.

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
        """Yield a temporary directory to fill; at the end of the block it becomes `global_step_STEP`.

        Other processes may write the files, also on other hosts that share the file system; all of them must have
        finished when the block ends. A checkpoint of the same step is replaced. Then the tracker file is updated and
        old checkpoints are deleted.

        Raises:
            CheckpointError: the block, or publishing its files, failed: disk full, a worker's error, ... The temporary
                directory is removed and earlier checkpoints are unchanged. KeyboardInterrupt and other exceptions that
                are not an `Exception` pass unchanged.
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
            number = _errno(error, temporary)
            self._discard(temporary)
            raise self._failure(published, error, number) from error
        except BaseException:
            self._discard(temporary)
            raise
        finally:
            _BEING_WRITTEN.discard(temporary.absolute())
        self._prune(step)

    def latest(self) -> Path | None:
        """Return the checkpoint that the tracker file names, or the newest complete one if the file names none.

        If the named checkpoint is damaged, the newest complete one before it is returned: later ones belong to another
        branch. Every file is read and compared with its checksum. Damage is logged as a warning.

        Returns:
            An absolute path, or None if there is no checkpoint.

        Raises:
            CheckpointError: every candidate is damaged.
        """
        found, damages = self._find_complete(contents=True)
        if found is None and damages:
            raise CheckpointError(
                f"{self.root} has no complete checkpoint to resume from: {'; '.join(damages)}. Restore the files, "
                "choose a checkpoint with trainer.resume_mode=resume_path and trainer.resume_from_path, or start a new "
                "run with trainer.resume_mode=disable"
            )
        return found

    def _find_complete(self, *, contents: bool) -> tuple[Path | None, list[str]]:
        """Return the checkpoint to resume from, or None, and the damage of the candidates before it.

        Args:
            contents: compare checksums, which reads every file.
        """
        candidates, problem = resume_candidates(self.root)
        if problem is not None:
            logger.warning("%s; using the newest complete checkpoint", problem)
        damages: list[str] = []
        for checkpoint in candidates:
            if (damage := find_damage(checkpoint, contents=contents)) is None:
                if damages:
                    logger.warning("falling back to %s", checkpoint)
                return checkpoint.absolute(), damages
            logger.warning("%s is skipped: %s", checkpoint, damage)
            damages.append(damage)
        return None, damages

    def checkpoints(self) -> list[Path]:
        """Return the published checkpoints in order of their steps."""
        return list_checkpoints(self.root)

    def resolve(self, resume_mode: str, resume_from_path: str | Path | None = None) -> Path | None:
        """Return the checkpoint to resume from, or None to start a new run.

        Args:
            resume_mode: `auto` (the latest checkpoint, if any), `disable`, or `resume_path` (`resume_from_path`, which
                may be in another root).
            resume_from_path: a `global_step_N` directory, relative to the working directory if not absolute.

        Raises:
            ValueError: unknown mode; or the path is missing or not named `global_step_N`.
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
                "trainer.resume_from_path is not set; resume_mode=resume_path needs it: set a global_step_N directory"
            )
        path = Path(resume_from_path).absolute()
        if not path.exists():
            raise FileNotFoundError(f"trainer.resume_from_path={resume_from_path}: {path} does not exist")
        try:
            step_of(path)
        except ValueError as error:
            raise ValueError(f"trainer.resume_from_path={error}") from None
        if (damage := find_damage(path)) is not None:
            raise CheckpointError(f"trainer.resume_from_path={resume_from_path}: {damage}; choose another checkpoint")
        return path

    def _publish(self, temporary: Path, published: Path) -> None:
        aside = None
        if published.exists():
            # rename(2) cannot replace a non-empty directory. After a kill in between, _sweep restores `aside`.
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
            # Rename first: a kill during the deletion must not leave a partial checkpoint under the published name.
            deleted = path.with_name(f"{path.name}.tmp-{os.getpid()}")
            try:
                os.rename(path, deleted)
            except OSError as error:
                logger.warning("%s is kept because it cannot be deleted (%s)", path, error)
                continue
            self._discard(deleted)

    def _sweep(self) -> None:
        """Undo or finish the saves of processes that no longer run."""
        if not self.root.is_dir():
            return
        for path in sorted(self.root.iterdir()):
            match = _UNFINISHED.fullmatch(path.name)
            if match is None or path.absolute() in _BEING_WRITTEN or _is_other_process(int(match["pid"])):
                continue
            published = path.with_name(match["name"])
            if match["kind"] == "old" and not published.exists():
                logger.warning("%s: its replacement is unfinished; restoring it", published)
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
        """Remove an unneeded path; if that fails, log it and leave it to the sweep of the next run."""
        try:
            self._remove(path)
        except OSError as error:
            logger.warning("%s cannot be removed (%s); delete it manually", path, error)

    def _failure(self, published: Path, error: Exception, number: int | None) -> CheckpointError:
        usable, _ = self._find_complete(contents=False)
        rest = f"{usable} stays usable" if usable is not None else "there is no earlier checkpoint"
        existing = next(path for path in (self.root.absolute(), *self.root.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        reason, way_out = f"{type(error).__name__}: {error}", "Free disk space"
        if number in _CAUSES:
            cause, way_out = _CAUSES[number]
            reason = f"{cause} ({reason})"
        text = (
            f"{published} was not saved: {reason}; {free} bytes are free on the disk of {existing}; {rest}. "
            f"{way_out} or choose another trainer.default_local_dir, then start again"
        )
        return CheckpointError(text) if number is None else CheckpointError(number, text)


def _errno(error: Exception, directory: Path) -> int | None:
    """Return the errno of a failed write below `directory`; None if the operating system did not refuse one.

    torch.save raises RuntimeError without errno, so a small write tells whether the disk still takes one.
    """
    if isinstance(error, OSError):
        return error.errno
    probe = directory / ".probe"
    try:
        probe.write_bytes(bytes(_PROBE_BYTES))
        fsync_path(probe)
    except OSError as refused:
        return refused.errno
    return None


def _flush(directory: Path) -> None:
    """Write the manifest, then flush every file and directory below `directory` to the disk."""
    write_manifest(directory)
    for parent, _, names in os.walk(directory, topdown=False):
        for name in names:
            fsync_path(Path(parent, name))
        fsync_path(parent)


def _is_other_process(pid: int) -> bool:
    """Return True if another process with that id runs on this host.

    This process does not count: its own directories are in `_BEING_WRITTEN`, so any other directory with its id comes
    from a dead process with the same id (process ids start again from 1 in a new container).
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


def save_driver_state(directory: str | Path, state: Mapping[str, object]) -> Path:
    """Store the driver's state (data loader, step, ...) as DIRECTORY/data.pt and return that path.

    Args:
        directory: the directory of the checkpoint.
        state: nested dicts, lists, tuples and sets of numbers, text, None, NumPy arrays and tensors.

    Raises:
        ValueError: a value cannot be loaded without executing code; raised now rather than when the run resumes.
    """
    import torch

    path = Path(directory) / DRIVER_STATE
    torch.save(state, path)
    try:
        load_driver_state(directory)
    except CheckpointError as error:
        raise ValueError(
            f"driver state {list(state)}: only dicts, lists, tuples, sets, numbers, text, NumPy arrays and tensors can "
            f"be stored ({error})"
        ) from error
    return path


def load_driver_state(directory: str | Path) -> dict[str, Any]:
    """Load the state that `save_driver_state` stored, without executing code from the file.

    Raises:
        CheckpointError: the file is missing or damaged, or contains other objects than plain data.
    """
    path = Path(directory) / DRIVER_STATE
    try:
        return _load_plain(path)
    except Exception as error:  # damaged bytes make the unpickler raise nearly any exception
        raise CheckpointError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error


def check_storable(state: object) -> None:
    """Check that `save_driver_state` can store a value; ValueError with the reason if it cannot."""
    import torch

    file = io.BytesIO()
    try:
        torch.save(state, file)
        file.seek(0)
        _load_plain(file)
    except Exception as error:  # an object of the user may raise any exception
        raise ValueError(_short_reason(error)) from error


def _short_reason(error: Exception) -> str:
    """Return the error's text; of torch's long refusal, only the type that was refused."""
    refused = re.search(r"Unsupported global: GLOBAL (\S+)|but got <class '(.+?)'>", str(error))
    return (
        f"it contains {refused[1] or refused[2]}"
        if refused
        else f"{type(error).__name__}: {str(error).splitlines()[0]}"
    )


def _load_plain(file: Path | io.BytesIO) -> Any:
    """Load plain data, tensors and NumPy values; other objects raise an error, because they could execute code."""
    import numpy as np
    import torch

    # The functions that pickle needs for arrays and scalars are private; NumPy's objects name them.
    rebuild: list[Any] = [np.array(0).__reduce__()[0], np.float64(0).__reduce__()[0]]
    dtypes = [type(np.dtype(code)) for code in "?bhilqBHILQefd"]
    with torch.serialization.safe_globals([np.ndarray, np.dtype, *rebuild, *dtypes]):
        return torch.load(file, map_location="cpu", weights_only=True)
