"""Choose the transport that `actor_rollout_ref.rollout.checkpoint_engine.backend` selects."""

from __future__ import annotations

import functools

from verl.config.rollout import CheckpointEngineConfig
from verl.workers.weight_sync.transports.base import Transport
from verl.workers.weight_sync.transports.collective import CollectiveTransport
from verl.workers.weight_sync.transports.ray_broadcast_proxy import start_broadcast_proxy
from verl.workers.weight_sync.transports.shared_memory import SharedMemoryTransport


def create_transport(config: CheckpointEngineConfig, backend: str, device: str) -> Transport:
    """Create the transport of a run.

    Args:
        backend: naive, nccl, hccl or gloo, as `resolve_backend` returns it.
        device: cpu, cuda or npu.
    """
    if backend == "naive":
        return SharedMemoryTransport()
    start = functools.partial(
        start_broadcast_proxy, backend=backend_on(device, backend), segments=config.buckets_in_flight
    )
    return CollectiveTransport(start, timeout_s=config.timeout)


def backend_on(device: str, backend: str) -> str:
    """Return the backend of torch.distributed. On an NPU, verl's users write nccl and get HCCL."""
    return "hccl" if (device, backend) == ("npu", "nccl") else backend
