"""One node's end of a weight update that crosses nodes, a process of its own.

    trainer's node                          each other node
    bucket in shared memory --send--> ... --receive--> the same bytes in shared memory there --> replicas of that node

A process that does nothing else can be ended at any time: a collective that hangs takes neither the trainer nor an
engine with it, and torch's process group is the only one in it, made as for any training run. Only bytes cross the
network; what they mean travels beside them through the driver.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from verl.utils.devices import torch_device
from verl.utils.network import choose_gloo_interface
from verl.workers.weight_sync.shm import SegmentReader, SharedSegment

# Of an accelerator's memory two of these are taken; one travels while the next is copied.
SLICE_BYTES = 64 << 20
# What a backend reaches.
DEVICES = {"gloo": "cpu", "nccl": "cuda", "hccl": "npu"}


class BroadcastProxy:
    """Rank 0 sends buckets that lie in shared memory of its node, every other rank receives them into its node's.

    Args:
        backend: of torch.distributed: gloo, nccl or hccl. The latter two go through the first visible device.
        segments: a received bucket stays valid until as many more were received.
    """

    def __init__(self, backend: str, segments: int):
        self._backend, self._device = backend, torch_device(DEVICES[backend])
        self._reader = SegmentReader()
        self._received: deque[SharedSegment | None] = deque([None] * segments)
        self._staged = self._device.type != "cpu"
        self._stages: list[torch.Tensor] = []
        self._store: dist.TCPStore | None = None

    def ready(self) -> int:
        """Answers once the process is up; its id."""
        return os.getpid()

    def listen(self, address: str, timeout_s: float) -> int:
        """Rank 0: wait for the others at a free port of `address`, and nowhere else; the port."""
        listener = socket.create_server((address, 0))
        port = listener.getsockname()[1]
        self._store = dist.TCPStore(
            address,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listener.detach(),
        )
        return port

    def join(self, rank: int, size: int, meeting: tuple[str, int], address: str, timeout_s: float) -> None:
        """Join the other relays as `rank` of `size`; all of them at the same time.

        Args:
            meeting: address and port where rank 0 listens.
            address: of this node, towards the others.
            timeout_s: seconds to wait for the others, here and in each later call.
        """
        timeout = timedelta(seconds=timeout_s)
        store = self._store or dist.TCPStore(*meeting, is_master=False, timeout=timeout)
        if self._backend == "gloo":
            choose_gloo_interface(address)
        dist.init_process_group(self._backend, store=store, rank=rank, world_size=size, timeout=timeout)

    def send(self, segment: dict[str, Any], nbytes: int) -> None:
        """Rank 0: the first `nbytes` bytes of a segment of this node to every other rank.

        Raises:
            WeightUpdateError: the segment cannot be opened here.
        """
        self._broadcast(self._reader.open(segment)[:nbytes], sends=True)

    def receive(self, nbytes: int) -> dict[str, int]:
        """The other ranks: the handle of the segment of this node that now holds them."""
        segment = self._received.popleft()
        if segment is None:
            segment = SharedSegment(nbytes)
        self._received.append(segment)
        segment.reserve(nbytes)
        self._broadcast(segment.bytes[:nbytes], sends=False)
        return segment.handle

    def _broadcast(self, memory: torch.Tensor, *, sends: bool) -> None:
        """`memory` (uint8 `[nbytes]`) piece by piece, two of them under way."""
        under_way: deque[tuple[dist.Work, torch.Tensor, torch.Tensor]] = deque()
        for index, piece in enumerate(memory.split(SLICE_BYTES)):
            if len(under_way) == 2:
                self._arrive(*under_way.popleft(), sends=sends)
            stage = self._stage(index % 2, piece)
            if sends and stage is not piece:
                stage.copy_(piece)
            under_way.append((dist.broadcast(stage, src=0, async_op=True), stage, piece))
        while under_way:
            self._arrive(*under_way.popleft(), sends=sends)

    def _arrive(self, work: dist.Work, stage: torch.Tensor, piece: torch.Tensor, *, sends: bool) -> None:
        work.wait()
        if not sends and stage is not piece:
            piece.copy_(stage)

    def _stage(self, index: int, piece: torch.Tensor) -> torch.Tensor:
        """Where the backend can reach a piece: on an accelerator one of two buffers, else the piece itself."""
        if not self._staged:
            return piece
        if not self._stages:
            self._stages = [torch.empty(SLICE_BYTES, dtype=torch.uint8, device=self._device) for _ in range(2)]
        return self._stages[index][: piece.numel()]
