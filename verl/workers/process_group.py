"""Resources that the workers of one rank share: its device, the process group of all ranks, and peak memory."""

from __future__ import annotations

import resource
import socket
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from verl.utils.devices import dist_backend, torch_device
from verl.utils.host import used_memory_bytes


def join_process_group(
    device: str, rank: int, world_size: int, master_addr: str, master_port: int, timeout: float | None = None
) -> DeviceMesh:
    """Return the mesh of all ranks; the first call joins the process group.

    Args:
        master_addr, master_port: address where rank 0 listens.
        timeout: time limit of each collective operation in seconds; None: torch's default for the backend.
    """
    if not dist.is_initialized():
        limit = None if timeout is None else timedelta(seconds=timeout)
        dist.init_process_group(
            dist_backend(device),
            store=_meeting_point(rank, world_size, master_addr, master_port, limit),
            rank=rank,
            world_size=world_size,
            timeout=limit,
        )
    return init_device_mesh(device, (world_size,))


def _meeting_point(rank: int, world_size: int, host: str, port: int, timeout: timedelta | None) -> dist.TCPStore:
    """Return the store through which the ranks find each other; torch's own would listen on every address of rank 0."""
    listener = None
    if rank == 0:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family).detach()
    return dist.TCPStore(
        host,
        port,
        world_size,
        is_master=rank == 0,
        timeout=timeout or dist.constants.default_pg_timeout,
        master_listen_fd=listener,
    )


def select_device(device: str, rank: int) -> torch.device:
    """Make this rank's device the current one and return it.

    If a process sees several devices, the ranks take them in turn.
    """
    if device == "cpu":
        return torch_device("cpu")
    module = torch.get_device_module(torch_device(device))
    selected = torch_device(device, rank % module.device_count())
    module.set_device(selected)
    return selected


def memory_metrics(prefix: str, device: torch.device) -> dict[str, float]:
    """Return the largest memory of any rank in GiB. Collective.

    Returns:
        PREFIX/perf/max_memory_allocated_gb: the peak of the allocated memory of the device; on a CPU that of the
        resident memory of the process. PREFIX/perf/max_memory_reserved_gb: the peak that the allocator held; not on a
        CPU. PREFIX/perf/cpu_memory_used_gb: the memory in use on the host now, of all processes; only if the system
        reports it.
    """
    if device.type == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        peaks = {"max_memory_allocated_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    else:
        module = torch.get_device_module(device)
        peaks = {
            "max_memory_allocated_gb": module.max_memory_allocated(device),
            "max_memory_reserved_gb": module.max_memory_reserved(device),
        }
    used = used_memory_bytes()
    values = [*peaks.values(), -1 if used is None else used]
    largest = torch.tensor([value / 2**30 for value in values], dtype=torch.float32, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    found = dict(zip([*peaks, "cpu_memory_used_gb"], largest.tolist(), strict=True))
    return {f"{prefix}/perf/{name}": value for name, value in found.items() if value >= 0}
