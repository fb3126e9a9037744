"""Brings what changed on each trainer rank to rank 0."""

from __future__ import annotations

import json

import torch
import torch.distributed as dist

from verl.workers.weight_sync.delta import DeltaBlock, DeltaChunk
from verl.workers.weight_sync.manifest import WeightUpdateError

# Pieces, and the bytes (uint8, on the CPU) that they speak of.
PackedBlock = tuple[list[DeltaChunk], torch.Tensor]


def gather_blocks(block: DeltaBlock, device: torch.device, error: Exception | None = None) -> list[PackedBlock]:
    """The blocks of all ranks that hold something, in rank order, on rank 0; none on the others. Collective.

    Bytes travel by all_to_all in the default process group: of what moves a different number from each rank, it is
    what gloo, nccl and hccl all have.

    Args:
        device: of the group's collectives.
        error: why this rank has no block; then it is raised, on other ranks as WeightUpdateError in its words.
    """
    table = json.dumps([piece.to_message() for piece in block.chunks]).encode() if block.chunks else b""
    sizes = _sizes(torch.tensor([len(table), block.nbytes, error is not None], device=device))
    if any(failed for _, _, failed in sizes):
        raise _first_error(error)
    first = dist.get_rank() == 0
    found: list[PackedBlock] = [(block.chunks, block.to_bytes())] if first and block.chunks else []
    # What rank 0 has needs no way; what it gets from the others follows one after the other.
    coming = [0, *(table_bytes + nbytes for table_bytes, nbytes, _ in sizes[1:])]
    if not any(coming):
        return found
    sent = torch.empty(0, dtype=torch.uint8)
    if not first and table:
        sent = torch.cat([torch.frombuffer(bytearray(table), dtype=torch.uint8), block.to_bytes()])
    arrived = torch.empty(sum(coming) if first else 0, dtype=torch.uint8, device=device)
    dist.all_to_all_single(
        arrived,
        sent.to(device),
        output_split_sizes=coming if first else [0] * len(sizes),
        input_split_sizes=[sent.numel(), *[0] * (len(sizes) - 1)],
    )
    if first:
        for part, (table_bytes, _, _) in zip(arrived.cpu().split(coming), sizes, strict=True):
            if part.numel():
                plain = json.loads(part[:table_bytes].numpy().tobytes())
                found.append(([DeltaChunk.from_message(piece) for piece in plain], part[table_bytes:]))
    return found


def _sizes(mine: torch.Tensor) -> list[list[int]]:
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone).tolist()


def _first_error(error: Exception | None) -> Exception:
    """This rank's, or the first one of another's, as a WeightUpdateError. Collective."""
    texts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, None if error is None else str(error))
    return error or WeightUpdateError(next(text for text in texts if text is not None))
