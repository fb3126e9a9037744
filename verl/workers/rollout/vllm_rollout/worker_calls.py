"""Typed calls of an engine's worker processes.

vLLM's `collective_rpc` takes the name of a method. Here the method itself is given, so that an editor can follow the
call and mypy checks its arguments and its results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from verl.workers.rollout.vllm_rollout.worker_extension import WeightUpdateExtension
from verl.workers.weight_sync.manifest import WeightUpdateError
from verl.workers.weight_sync.messages import BucketReport, EngineReport, WorkerReply

P = ParamSpec("P")
R = TypeVar("R")


class Engine(Protocol):
    """vLLM's `AsyncLLM`, as far as it is used here."""

    async def collective_rpc(self, method: str, *, args: tuple[Any, ...] = ()) -> list[Any]:
        """Call a method by name in every worker, and return the results by rank."""


async def call_workers(
    engine: Engine,
    method: Callable[Concatenate[WeightUpdateExtension, P], R],
    *arguments: P.args,
    **keywords: P.kwargs,
) -> list[R]:
    """Call a method of `WeightUpdateExtension` in every worker of an engine, and return the results by rank."""
    assert not keywords, "collective_rpc passes positional arguments"
    return await engine.collective_rpc(method.__name__, args=arguments)


def results(replies: Sequence[WorkerReply[R]], replica: int) -> list[R]:
    """Return the results of all workers of a replica.

    Raises:
        WeightUpdateError: a worker returned an error; the message names it.
    """
    for rank, reply in enumerate(replies):
        if reply["error"] is not None:
            raise WeightUpdateError(f"replica {replica}, worker {rank}: {reply['error']}")
    return [reply["result"] for reply in replies]  # type: ignore[misc]  # None only if R allows it: there is no error


def merge_bucket_reports(reports: Sequence[BucketReport]) -> BucketReport:
    """Return one report for all workers of a replica: a tensor is used if one of them, which may hold a part, read it.

    With expert parallelism, for example, each worker reads its own experts.
    """
    unused = set.intersection(*(set(report["unused"]) for report in reports))
    dtypes = {name: dtype for report in reports for name, dtype in report["dtypes"].items()}
    return {"unused": sorted(unused), "dtypes": dtypes}


def merge_reports(reports: Sequence[EngineReport]) -> EngineReport:
    """Return one report for all workers of a replica: the largest numbers; a delta is accepted if all accept it."""
    return {
        "load": max(report["load"] for report in reports),
        "encode": max(report["encode"] for report in reports),
        "finish": max(report["finish"] for report in reports),
        "bytes": max(report["bytes"] for report in reports),
        # Workers that quantize do so with all weights, each of them.
        "errors": reports[0]["errors"],
        "accepts_delta": all(report["accepts_delta"] for report in reports),
    }
