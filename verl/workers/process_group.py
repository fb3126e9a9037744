"""Resources that the workers of one rank share: its device, the process group of all ranks, and peak memory."""

from __future__ import annotations

import resource
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from verl.utils.devices import dist_backend, torch_device

_COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def join_process_group(device: str, rank: int, world_size: int, master_addr: str, master_port: int) -> DeviceMesh:
    """Return the mesh of all ranks; the first call joins the process group.

    Args:
        master_addr, master_port: address where rank 0 listens.
    """
    if not dist.is_initialized():
        host = f"[{master_addr}]" if ":" in master_addr else master_addr
        dist.init_process_group(
            dist_backend(device),
            init_method=f"tcp://{host}:{master_port}",
            rank=rank,
            world_size=world_size,
            timeout=_COLLECTIVE_TIMEOUT,
        )
    return init_device_mesh(device, (world_size,))


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


def peak_memory_gb(device: torch.device) -> float:
    """Return the largest peak memory of any rank in GiB. Collective.

    On an accelerator it is the allocated memory, on a CPU the resident memory of the process.
    """
    if device.type == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    else:
        peak = torch.get_device_module(device).max_memory_allocated(device)
    largest = torch.tensor(peak / 2**30, dtype=torch.float32, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()
