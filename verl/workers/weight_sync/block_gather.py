"""Bring the changed elements of each trainer rank to rank 0."""

from __future__ import annotations

import json
from typing import NamedTuple

import torch
import torch.distributed as dist

from verl.workers.weight_sync.delta import DeltaBlock, DeltaChunk
from verl.workers.weight_sync.manifest import WeightUpdateError


class PackedBlock(NamedTuple):
    """The chunks of one rank, and the block that holds their bytes: uint8 [n], on the CPU."""

    chunks: list[DeltaChunk]
    data: torch.Tensor


def gather_blocks(block: DeltaBlock, device: torch.device, error: Exception | None = None) -> list[PackedBlock]:
    """Gather the non-empty blocks of all ranks to rank 0. Collective.

    Bytes travel by all_to_all in the default process group: it is the one collective of gloo, nccl and hccl in which
    each rank may send a different number of bytes.

    Args:
        block: the block of this rank.
        device: device of the group's collectives.
        error: the reason why this rank has no block. It is raised here, and as WeightUpdateError on the other ranks.

    Returns:
        On rank 0 the blocks in rank order; on other ranks an empty list.
    """
    table = json.dumps([chunk.to_message() for chunk in block.chunks]).encode() if block.chunks else b""
    sizes = _gather_sizes(torch.tensor([len(table), block.nbytes, error is not None], device=device))
    if any(failed for _, _, failed in sizes):
        raise _first_error(error)
    is_rank0 = dist.get_rank() == 0
    gathered = [PackedBlock(block.chunks, block.to_bytes())] if is_rank0 and block.chunks else []
    # Rank 0's own data is not sent. The data of the other ranks follows in rank order.
    incoming = [0, *(table_bytes + nbytes for table_bytes, nbytes, _ in sizes[1:])]
    if not any(incoming):
        return gathered
    sent = torch.empty(0, dtype=torch.uint8)
    if not is_rank0 and table:
        sent = torch.cat([torch.frombuffer(bytearray(table), dtype=torch.uint8), block.to_bytes()])
    received = torch.empty(sum(incoming) if is_rank0 else 0, dtype=torch.uint8, device=device)
    dist.all_to_all_single(
        received,
        sent.to(device),
        output_split_sizes=incoming if is_rank0 else [0] * len(sizes),
        input_split_sizes=[sent.numel(), *[0] * (len(sizes) - 1)],
    )
    if is_rank0:
        for part, (table_bytes, _, _) in zip(torch.split(received.cpu(), incoming), sizes, strict=True):
            if part.numel():
                messages = json.loads(part[:table_bytes].numpy().tobytes())
                chunks = [DeltaChunk.from_message(message) for message in messages]
                gathered.append(PackedBlock(chunks, part[table_bytes:]))
    return gathered


def _gather_sizes(own: torch.Tensor) -> list[list[int]]:
    """Return the numbers [3] of every rank, in rank order. Collective."""
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    sizes: list[list[int]] = torch.stack(gathered).tolist()
    return sizes


def _first_error(error: Exception | None) -> Exception:
    """Return this rank's error, or the first error of another rank as a WeightUpdateError. Collective."""
    texts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, None if error is None else str(error))
    return error or WeightUpdateError(next(text for text in texts if text is not None))
