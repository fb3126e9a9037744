"""Errors of single ranks while all ranks read or write files together.

A rank that raised alone would leave the others waiting in their next collective. So each rank collects the errors of
its own files, still takes part in every collective, and at the end all ranks raise the same error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException


class RankFilesError(OSError):
    """At least one rank could not read or write its files; raised on all ranks. `errno` is that of the first error."""


class RankErrors:
    """The errors of this rank.

    Example:
        >>> errors = RankErrors()
        >>> with errors.collect():
        ...     path.write_bytes(own_part)
        >>> errors.raise_together(group)
    """

    def __init__(self) -> None:
        self.first: Exception | None = None

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keep the first exception of the blocks instead of raising it. No block may contain a collective."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  (`raise_together` raises it)
            self.first = self.first or error

    def raise_together(self, group: dist.ProcessGroup | None = None) -> None:
        """Return if no rank has an error. Collective, and so a barrier too.

        Raises:
            RankFilesError: on all ranks; it names the ranks that have an error.
        """
        own = None if self.first is None else _description(self.first)
        found: list[tuple[int | None, str] | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, own, group=group)
        failed = {rank: error for rank, error in enumerate(found) if error is not None}
        if failed:
            raise _together(failed) from self.first


@contextmanager
def checkpoint_errors() -> Iterator[None]:
    """Translate the error of torch.distributed.checkpoint, which is no `Exception` and so would end a Ray worker.

    It raises on all ranks if one rank fails.

    Raises:
        RankFilesError: on all ranks.
    """
    try:
        yield
    except CheckpointException as error:
        failures = {rank: failure[0] for rank, failure in error.failures.items()}
        raise _together({rank: _description(failures[rank]) for rank in sorted(failures)}) from error


def _description(error: BaseException) -> tuple[int | None, str]:
    """Return errno, if it has one, and text."""
    return getattr(error, "errno", None), f"{type(error).__name__}: {error}"


def _together(failed: Mapping[int, tuple[int | None, str]]) -> RankFilesError:
    text = "; ".join(f"rank {rank}: {text}" for rank, (_, text) in failed.items())
    number = next(iter(failed.values()))[0]
    return RankFilesError(text) if number is None else RankFilesError(number, text)
