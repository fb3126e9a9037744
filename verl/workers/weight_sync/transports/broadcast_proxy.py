"""The process that sends or receives the broadcasts of one node in a weight update across nodes.

    trainer's node                          each other node
    bucket in shared memory --send--> ... --receive--> the same bytes in shared memory there --> replicas of that node

It is a separate process so that it can be ended at any time: a collective that hangs takes neither the trainer nor an
engine with it. Torch's process group is the only one in the process, and is created as for any training run. Only bytes
cross the network; their description travels through the driver.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from datetime import timedelta

import torch
import torch.distributed as dist

from verl.utils.devices import torch_device
from verl.utils.network import choose_gloo_interface
from verl.workers.weight_sync.messages import SegmentHandle
from verl.workers.weight_sync.shm import SegmentReader, SharedSegment

# Two staging buffers of this size take memory of an accelerator: one is broadcast while the other is copied.
SLICE_BYTES = 64 << 20
# Device of the tensors that a backend broadcasts.
DEVICES = {"gloo": "cpu", "nccl": "cuda", "hccl": "npu"}


class BroadcastProxy:
    """Rank 0 sends buckets from the shared memory of its node; every other rank receives them into that of its node.

    Args:
        backend: of torch.distributed: gloo, nccl or hccl. The latter two use the first visible device.
        segments: number of segments for received buckets; a received bucket stays valid until that many more were
            received.
    """

    def __init__(self, backend: str, segments: int):
        self._backend, self._device = backend, torch_device(DEVICES[backend])
        self._reader = SegmentReader()
        self._received: deque[SharedSegment | None] = deque([None] * segments)
        self._staged = self._device.type != "cpu"
        self._stages: list[torch.Tensor] = []
        self._store: dist.TCPStore | None = None

    def ready(self) -> int:
        """Return the process id; the call returns once the process is up."""
        return os.getpid()

    def listen(self, address: str, timeout_s: float) -> int:
        """On rank 0: listen for the other ranks on `address` only, and return the port, a free one."""
        listener = socket.create_server((address, 0))
        port = int(listener.getsockname()[1])
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
        """Join the other proxies as `rank` of `size`. All of them must join at the same time.

        Args:
            meeting: address and port on which rank 0 listens.
            address: of this node, as the others reach it.
            timeout_s: seconds to wait for the others, here and in each later call.
        """
        timeout = timedelta(seconds=timeout_s)
        store = self._store or dist.TCPStore(*meeting, is_master=False, timeout=timeout)
        if self._backend == "gloo":
            choose_gloo_interface(address)
        dist.init_process_group(self._backend, store=store, rank=rank, world_size=size, timeout=timeout)

    def send(self, segment: SegmentHandle, nbytes: int) -> None:
        """On rank 0: send the first `nbytes` bytes of a segment of this node to every other rank.

        Raises:
            WeightUpdateError: the segment cannot be opened here.
        """
        self._broadcast(self._reader.open(segment)[:nbytes], sends=True)

    def receive(self, nbytes: int) -> SegmentHandle:
        """On the other ranks: receive these bytes into a segment of this node, and return its handle."""
        segment = self._received.popleft()
        if segment is None:
            segment = SharedSegment(nbytes)
        self._received.append(segment)
        segment.reserve(nbytes)
        self._broadcast(segment.bytes[:nbytes], sends=False)
        return segment.handle

    def _broadcast(self, memory: torch.Tensor, *, sends: bool) -> None:
        """Broadcast `memory` (uint8 [nbytes]) in slices, two of them at the same time."""
        pending: deque[tuple[dist.Work, torch.Tensor, torch.Tensor]] = deque()
        for index, part in enumerate(torch.split(memory, SLICE_BYTES)):
            if len(pending) == 2:
                self._complete(*pending.popleft(), sends=sends)
            stage = self._stage(index % 2, part)
            if sends and stage is not part:
                stage.copy_(part)
            pending.append((dist.broadcast(stage, src=0, async_op=True), stage, part))
        while pending:
            self._complete(*pending.popleft(), sends=sends)

    def _complete(self, work: dist.Work, stage: torch.Tensor, part: torch.Tensor, *, sends: bool) -> None:
        """Wait for the broadcast of a slice and, on a receiving rank, copy it to its destination."""
        work.wait()
        if not sends and stage is not part:
            part.copy_(stage)

    def _stage(self, index: int, part: torch.Tensor) -> torch.Tensor:
        """Return the tensor to broadcast for a slice: on an accelerator one of two buffers, else the slice itself."""
        if not self._staged:
            return part
        if not self._stages:
            self._stages = [torch.empty(SLICE_BYTES, dtype=torch.uint8, device=self._device) for _ in range(2)]
        return self._stages[index][: part.numel()]
