"""What the workers of one rank share: its device, the group of all ranks, the memory it took."""

from __future__ import annotations

import resource
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from verl.utils.devices import dist_backend, torch_device

_COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def join_ranks(device: str, rank: int, world_size: int, master_addr: str, master_port: int) -> DeviceMesh:
    """The mesh of all ranks; the first call joins their process group, which rank 0 listens for at that address."""
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


def own_device(device: str, rank: int) -> torch.device:
    """This rank's device; where a process sees several of them, they are dealt out by rank."""
    if device == "cpu":
        return torch_device("cpu")
    module = torch.get_device_module(torch_device(device))
    own = torch_device(device, rank % module.device_count())
    module.set_device(own)
    return own


def peak_memory_gb(device: torch.device) -> float:
    """GiB at the peak, of the rank that needed most: allocated on an accelerator, resident on a CPU; collective."""
    if device.type == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    else:
        peak = torch.get_device_module(device).max_memory_allocated(device)
    worst = torch.tensor(peak / 2**30, dtype=torch.float32, device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst.item()
