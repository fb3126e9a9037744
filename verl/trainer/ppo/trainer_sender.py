"""The sending end of a weight update on the driver's side."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from verl.single_controller.worker_group import WorkerGroup
from verl.utils.quantization.encode_report import merged_errors
from verl.workers.train_worker import TrainWorker
from verl.workers.weight_sync.messages import Bucket, ExportReport


class TrainerSender:
    """The trainer ranks as the sender of a weight update: rank 0 sends, the other ranks take part in the gathers."""

    def __init__(self, group: WorkerGroup[TrainWorker]):
        self._group = group
        self._others: list[asyncio.Future[None]] = []

    async def begin_export(self, version: int, base: int | None = None) -> None:
        if base is not None:
            # Check all ranks first: a rank that refuses alone would leave the others waiting for it.
            await self._group.all(TrainWorker.check_base, base)
        self._others = [
            asyncio.ensure_future(self._group.rank(rank, TrainWorker.join_export, version, base))
            for rank in range(1, len(self._group))
        ]
        await self._group.rank(0, TrainWorker.begin_export, version, base)

    async def send_as(self, dtypes: Mapping[str, str]) -> None:
        await self._group.all(TrainWorker.send_as, dict(dtypes))

    async def next_bucket(self) -> Bucket:
        return await self._group.rank(0, TrainWorker.next_bucket)

    async def abort_export(self) -> None:
        await self._group.rank(0, TrainWorker.abort_export)
        await asyncio.gather(*self._others, return_exceptions=True)

    async def finish_export(self) -> ExportReport:
        await asyncio.gather(*self._others)
        exports = await self._group.all(TrainWorker.finish_export)
        rank0 = exports[0]
        return {
            "manifest": rank0["manifest"],
            "seconds": rank0["seconds"],
            "encode": rank0["report"]["seconds"],
            # Each rank encoded other rows, so their errors are merged.
            "errors": merged_errors(export["report"] for export in exports),
            "full_bytes": rank0["full_bytes"],
        }
