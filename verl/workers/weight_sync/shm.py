"""Memory shared between processes of one host, without a name that could outlive them.

A segment is an anonymous `memfd`; another process of the same user opens it through the owner's `/proc/<pid>/fd/<n>`.
The kernel frees it with its last user, so neither a crash nor SIGKILL leaves anything behind in `/dev/shm`.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

import torch

from verl.workers.weight_sync.manifest import WeightUpdateError
from verl.workers.weight_sync.messages import SegmentHandle


class SharedSegment:
    """A growable block of shared memory that this process owns and fills.

    Args:
        nbytes: initial size in bytes.

    Attributes:
        bytes: uint8 [nbytes], the whole segment.
    """

    def __init__(self, nbytes: int):
        self._fd = os.memfd_create("verl-weights", os.MFD_CLOEXEC)
        self._map: mmap.mmap | None = None
        self.nbytes = 0
        self.reserve(nbytes)

    def reserve(self, nbytes: int) -> None:
        """Grow to at least `nbytes`. The present content is kept."""
        if nbytes <= self.nbytes:
            return
        # posix_fallocate takes the pages now, so that a full memory is an OSError here and not a SIGBUS while copying.
        os.posix_fallocate(self._fd, 0, nbytes)
        self.bytes = torch.empty(0, dtype=torch.uint8)
        self._map = mmap.mmap(self._fd, nbytes)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self.nbytes = nbytes

    @property
    def handle(self) -> SegmentHandle:
        """The numbers that another process needs to open this segment."""
        return {"pid": os.getpid(), "fd": self._fd, "nbytes": self.nbytes}

    def close(self) -> None:
        """Release the memory. Tensors that were handed out keep their mapping until they are freed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self.bytes = torch.empty(0, dtype=torch.uint8)
            self._map = None


@dataclass(frozen=True)
class _Key:
    pid: int
    fd: int
    nbytes: int


class SegmentReader:
    """Maps segments of other processes, each once: a run reuses its segments in every update."""

    def __init__(self) -> None:
        self._maps: dict[tuple[int, int], tuple[_Key, torch.Tensor]] = {}

    def open(self, handle: SegmentHandle) -> torch.Tensor:
        """Return the shared bytes of a segment, uint8 [nbytes]. They must not be written to.

        Raises:
            WeightUpdateError: the segment cannot be opened here, or is smaller than the handle says.
        """
        key = _Key(int(handle["pid"]), int(handle["fd"]), int(handle["nbytes"]))
        known = self._maps.get((key.pid, key.fd))
        if known is not None and known[0] == key:
            return known[1]
        path = f"/proc/{key.pid}/fd/{key.fd}"
        try:
            fd = os.open(path, os.O_RDWR)
        except OSError as error:
            self.drop_ended()
            raise WeightUpdateError(
                f"the weight bucket in process {key.pid} cannot be opened ({error.strerror}): the sender ended, or it "
                "runs on another host, in another container or as another user"
            ) from error
        try:
            size = os.fstat(fd).st_size
            if size < key.nbytes:
                raise WeightUpdateError(
                    f"the weight bucket in process {key.pid} has {size} bytes, expected {key.nbytes}"
                )
            memory = mmap.mmap(fd, key.nbytes)
        finally:
            os.close(fd)
        tensor = torch.frombuffer(memory, dtype=torch.uint8)
        if known is None:
            self.drop_ended()
        self._maps[key.pid, key.fd] = (key, tensor)
        return tensor

    def drop_ended(self) -> None:
        """Drop the mappings of processes that have ended, which would keep their memory."""
        self._maps = {name: entry for name, entry in self._maps.items() if os.path.exists(f"/proc/{name[0]}")}

    def close(self) -> None:
        """Drop every mapping."""
        self._maps.clear()
