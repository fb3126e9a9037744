"""The calls of the sender to the trainer ranks, and their order."""

import asyncio

import pytest

from verl.trainer.ppo.trainer_sender import TrainerSender
from verl.workers.weight_sync.manifest import WeightUpdateError


class Ranks:
    """Two ranks that record their calls."""

    def __init__(self, refuses=None):
        self.calls, self._refuses = [], refuses

    def __len__(self):
        return 2

    async def rank(self, rank, method, *arguments):
        method = method.__name__
        self.calls.append((rank, method, *arguments))
        if method == "check_base" and rank == self._refuses:
            raise WeightUpdateError("cannot build a delta against version 4: no weights were sent yet")
        if method == "finish_export":
            report = {"report": {"seconds": 1.0 + rank, "errors": {"w": [1.0 + rank, 100.0]}}}
            return report | ({"manifest": {"version": 5}, "seconds": 3.0, "full_bytes": 9} if rank == 0 else {})
        return None

    async def all(self, method, *arguments):
        return list(await asyncio.gather(*(self.rank(rank, method, *arguments) for rank in range(2))))


@pytest.mark.parametrize("base", [None, 4])
def test_all_ranks_take_part_and_commit(base):
    async def program():
        ranks = Ranks()
        sender = TrainerSender(ranks)
        await sender.begin_export(5, base)
        await sender.next_bucket()
        return ranks.calls, await sender.finish_export()

    calls, export = asyncio.run(program())
    first_calls = [(0, "check_base", 4), (1, "check_base", 4)] if base else []
    assert calls[: len(first_calls)] == first_calls
    assert set(calls[len(first_calls) :]) == {
        (0, "begin_export", 5, base),
        (1, "join_export", 5, base),
        (0, "next_bucket"),
        *((rank, "finish_export") for rank in range(2)),
    }
    assert export["manifest"] == {"version": 5} and export["full_bytes"] == 9 and export["encode"] == 1.0
    assert export["errors"] == {"w": [3.0, 200.0]}


@pytest.mark.parametrize("rank", [0, 1])
def test_no_export_starts_if_a_rank_has_another_version(rank):
    async def program():
        ranks = Ranks(refuses=rank)
        sender = TrainerSender(ranks)
        with pytest.raises(WeightUpdateError, match="no weights were sent yet"):
            await sender.begin_export(5, 4)
        await sender.abort_export()
        return ranks.calls

    assert {method for _, method, *_ in asyncio.run(program())} <= {"check_base", "abort_export"}
