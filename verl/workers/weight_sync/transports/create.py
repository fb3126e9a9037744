"""Choose the transport that `actor_rollout_ref.rollout.checkpoint_engine.backend` names."""

from __future__ import annotations

from verl.config.rollout import CheckpointEngineConfig
from verl.workers.weight_sync.transports.base import Node, Transport
from verl.workers.weight_sync.transports.collective import CollectiveTransport
from verl.workers.weight_sync.transports.ray_broadcast_proxy import RayBroadcastProxy
from verl.workers.weight_sync.transports.shared_memory import SharedMemoryTransport


def create_transport(config: CheckpointEngineConfig, backend: str, device: str) -> Transport:
    """What `backend` names, as `resolve_backend` finds it, on a device (`cpu`, `cuda` or `npu`)."""
    if backend == "naive":
        return SharedMemoryTransport()

    def start(node: Node) -> RayBroadcastProxy:
        return RayBroadcastProxy(node, backend_on(device, backend), config.buckets_in_flight)

    return CollectiveTransport(start, timeout_s=config.timeout)


def backend_on(device: str, backend: str) -> str:
    """The backend of torch.distributed; on an NPU verl's users write nccl and get HCCL."""
    return "hccl" if (device, backend) == ("npu", "nccl") else backend
