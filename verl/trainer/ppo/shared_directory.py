"""Whether every rank of a trainer on several hosts sees the directory that checkpoints go to."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class Ranks(Protocol):
    async def all(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every rank; the results in rank order."""


async def check_shared(directory: str | Path, ranks: Ranks, addresses: Sequence[str]) -> None:
    """Write a file here and have it read by every rank; at the start, not at the first checkpoint.

    Args:
        directory: `trainer.default_local_dir`; made if missing.
        addresses: of each rank's host, for the message.

    Raises:
        FileNotFoundError: a rank does not see the file: its part of a checkpoint would be on another disk.
    """
    directory, text = Path(directory).absolute(), uuid.uuid4().hex
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / f".seen-by-all-ranks-{text}"
    probe.write_text(text, encoding="utf-8")
    try:
        seen = await ranks.all("read_text", str(probe))
    finally:
        probe.unlink()
    blind = [f"rank {rank} on {address}" for rank, address in enumerate(addresses) if seen[rank] != text]
    if blind:
        raise FileNotFoundError(
            f"trainer.default_local_dir={directory}: {', '.join(blind)} cannot read what is written there; with "
            "trainer.nnodes above 1 it has to be on a file system that all nodes share, at the same path"
        )
