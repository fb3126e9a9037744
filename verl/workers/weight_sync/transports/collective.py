"""The transport `nccl`, `hccl` or `gloo`, as the driver runs it: each bucket is broadcast once to every other node.

    sender --bucket k--> proxy 0 ==broadcast==> proxy 1 --bucket k in memory of node 1--> replicas of node 1
       (trainer's node)          ==broadcast==> proxy n --bucket k in memory of node n--> replicas of node n

Replicas on the trainer's node read its shared memory directly. The sender and the receivers that `connect` returns are
used like any others: bucket k + 1 is filled while bucket k is broadcast and bucket k - 1 is loaded.

The driver watches the clock. After any error, in a proxy or between two of them, all proxies end with the update, and
the next update starts new ones.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from verl.single_controller.actor import ActorDied
from verl.timeline.spans import span, spanned
from verl.utils.asyncio_utils import cancel_and_wait
from verl.workers.weight_sync.driver import Receiver, Sender
from verl.workers.weight_sync.manifest import WeightUpdateError
from verl.workers.weight_sync.messages import (
    Bucket,
    BucketReport,
    EngineReport,
    ExportReport,
    ManifestMessage,
    SegmentHandle,
)
from verl.workers.weight_sync.transports.base import Node
from verl.workers.weight_sync.transports.broadcast_proxy import BroadcastProxy

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
# Segment of a broadcast bucket on each node; None on the sending one.
Segments = dict[Node, SegmentHandle | None]

# Time to look for the cause of a failure: a proxy that lost a peer fails before the peer is known to be dead.
_GRACE_S = 5.0


class ProxyHandle(Protocol):
    """A `BroadcastProxy` in another process; `Actor[BroadcastProxy]` is one."""

    async def call(
        self, method: Callable[Concatenate[BroadcastProxy, P], R], *arguments: P.args, **keywords: P.kwargs
    ) -> R:
        """Return the method's result, or raise its error. `ready` returns also during another call.

        Raises:
            ActorDied: the process ended.
        """

    def kill(self) -> None:
        """End the process at once, during any call."""


class CollectiveTransport:
    """Reaches replicas on any node through one broadcast proxy per node.

    Args:
        start: starts a proxy on a node.
        timeout_s: seconds that starting the proxies, and each broadcast of a bucket, may take.
    """

    def __init__(self, start: Callable[[Node], ProxyHandle], *, timeout_s: float):
        self._start, self._timeout_s = start, timeout_s
        self._nodes: tuple[Node, ...] = ()
        self._joined: tuple[Node, ...] = ()
        self._proxies: dict[Node, ProxyHandle] = {}
        self._broadcasts: dict[int, asyncio.Task[Segments]] = {}
        self._last_broadcast: asyncio.Task[Segments] | None = None

    def connect(
        self, sender: Sender, home: Node, receivers: Sequence[tuple[Receiver, Node]]
    ) -> tuple[Sender, list[Receiver]]:
        """Return a sender and receivers that use the proxies; the arguments if all receivers run on `home`."""
        remote = dict.fromkeys(node for _, node in receivers if node != home)
        if not remote:
            self.close()
            return sender, [receiver for receiver, _ in receivers]
        self._nodes = (home, *remote)
        return _BroadcastingSender(self, sender), [
            receiver if node == home else _RemoteReceiver(self, receiver, node) for receiver, node in receivers
        ]

    @spanned("update: broadcast proxies")
    async def prepare(self) -> None:
        """Make sure that a proxy runs on every node and that all of them are connected.

        Raises:
            WeightUpdateError: a proxy cannot be started or connected; the message names its node.
        """
        self._broadcasts, self._last_broadcast = {}, None
        home, nodes = self._nodes[0], self._nodes
        if self._joined == nodes:
            try:
                await self._call_all({node: self._call(node, BroadcastProxy.ready) for node in nodes}, _GRACE_S)
                return
            except WeightUpdateError as error:
                logger.warning("%s: starting new broadcast proxies", error)
        self.close()
        self._proxies = {node: self._start(node) for node in nodes}
        await self._call_all({node: self._call(node, BroadcastProxy.ready) for node in nodes})
        one_host = len({node.address for node in nodes}) == 1
        address = {node: "127.0.0.1" if one_host else node.address for node in nodes}
        # Twice the time, so that the driver's clock runs out first: only the driver can find out which node is silent.
        timeout_s = 2 * self._timeout_s
        ports = await self._call_all({home: self._call(home, BroadcastProxy.listen, address[home], timeout_s)})
        meeting = address[home], ports[home]
        await self._call_all(
            {
                node: self._call(node, BroadcastProxy.join, rank, len(nodes), meeting, address[node], timeout_s)
                for rank, node in enumerate(nodes)
            }
        )
        self._joined = nodes

    def send(self, bucket: Bucket) -> None:
        """Start the broadcast of a bucket, after those of earlier buckets; `segment` waits for it."""
        if bucket["nbytes"]:
            assert bucket["segment"] is not None
            broadcast = self._broadcast(self._last_broadcast, bucket["segment"], int(bucket["nbytes"]))
            self._last_broadcast = asyncio.ensure_future(broadcast)
            self._broadcasts[bucket["index"]] = self._last_broadcast

    async def segment(self, bucket: Bucket, node: Node) -> SegmentHandle | None:
        """Wait for a bucket on `node`, and return the segment that holds it there."""
        if not bucket["nbytes"]:
            return bucket["segment"]
        # Several receivers wait for one bucket; the cancellation of one of them must not cancel the broadcast.
        return (await asyncio.shield(self._broadcasts[bucket["index"]]))[node]

    async def wait_idle(self) -> None:
        """Wait until no broadcast runs after a failed update; end the proxies if one takes too long."""
        running = [task for task in self._broadcasts.values() if not task.done()]
        if running:
            _, late = await asyncio.wait(running, timeout=_GRACE_S)
            if late:
                self.close()
            for task in late:
                task.cancel()
        await asyncio.gather(*self._broadcasts.values(), return_exceptions=True)

    def close(self) -> None:
        """End every proxy."""
        for proxy in self._proxies.values():
            proxy.kill()
        self._proxies, self._joined = {}, ()

    async def _broadcast(
        self, previous: asyncio.Task[Segments] | None, segment: SegmentHandle, nbytes: int
    ) -> Segments:
        if previous is not None:
            await asyncio.shield(previous)
        home, *others = self._nodes
        with span("update: broadcast a bucket", bytes=nbytes, nodes=len(others)):
            calls: dict[Node, Coroutine[Any, Any, SegmentHandle | None]] = {
                home: self._call(home, BroadcastProxy.send, segment, nbytes)
            }
            return await self._call_all(
                calls | {node: self._call(node, BroadcastProxy.receive, nbytes) for node in others}
            )

    def _call(
        self,
        node: Node,
        method: Callable[Concatenate[BroadcastProxy, P], R],
        *arguments: P.args,
        **keywords: P.kwargs,
    ) -> Coroutine[Any, Any, R]:
        return _call(self._proxies.get(node), method, *arguments, **keywords)

    async def _call_all(
        self, calls: Mapping[Node, Coroutine[Any, Any, R]], timeout_s: float | None = None
    ) -> dict[Node, R]:
        """Await calls of proxies at the same time and return their results by node.

        Args:
            timeout_s: seconds that the calls may take; None for the transport's `timeout_s`.

        Raises:
            WeightUpdateError: a call failed or took too long. All proxies have been ended.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        tasks: dict[Node, asyncio.Future[R]] = {node: asyncio.ensure_future(call) for node, call in calls.items()}
        try:
            _, pending = await asyncio.wait(tasks.values(), timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
            if not pending and not any(task.exception() for task in tasks.values()):
                return {node: task.result() for node, task in tasks.items()}
            cause = await self._find_cause(tasks, timeout_s)
            self.close()
            raise WeightUpdateError(f"broadcasting weights to other nodes failed: {cause}")
        finally:
            await cancel_and_wait(tasks.values())

    async def _find_cause(self, tasks: Mapping[Node, asyncio.Future[Any]], timeout_s: float) -> str:
        """Describe the failed nodes; if some proxies died only those, because the others failed for lack of them."""
        died = await _wait_for_death(tasks)
        if died:
            return "; ".join(f"node {node}: {tasks[node].exception()}" for node in died)
        errors = {node: task.exception() for node, task in tasks.items() if task.done()}
        failed = [f"node {n}: {type(error).__name__}: {error}" for n, error in errors.items() if error is not None]
        if failed:
            return "; ".join(failed)
        # A proxy that waits for another one in the broadcast still responds to `ready`.
        probes = {
            node: asyncio.ensure_future(self._call(node, BroadcastProxy.ready))
            for node, task in tasks.items()
            if not task.done()
        }
        await asyncio.wait(probes.values(), timeout=_GRACE_S)
        silent = [node for node, probe in probes.items() if not probe.done() or probe.exception() is not None]
        await cancel_and_wait(probes.values())
        return (
            f"no response in {timeout_s:g} s (actor_rollout_ref.rollout.checkpoint_engine.timeout) from node "
            + ", ".join(map(str, silent or probes))
        )


async def _call(
    proxy: ProxyHandle | None,
    method: Callable[Concatenate[BroadcastProxy, P], R],
    *arguments: P.args,
    **keywords: P.kwargs,
) -> R:
    if proxy is None:
        raise ActorDied("the broadcast proxy was ended")
    return await proxy.call(method, *arguments, **keywords)


async def _wait_for_death(tasks: Mapping[Node, asyncio.Future[Any]]) -> list[Node]:
    """Return the nodes whose proxy died. If calls failed without a death, wait a while: it may not be known yet."""
    deadline = asyncio.get_running_loop().time() + _GRACE_S
    while True:
        errors = {node: task.exception() for node, task in tasks.items() if task.done()}
        died = [node for node, error in errors.items() if isinstance(error, ActorDied)]
        pending = [task for task in tasks.values() if not task.done()]
        left = deadline - asyncio.get_running_loop().time()
        if died or not pending or left <= 0 or not any(errors.values()):
            return died
        await asyncio.wait(pending, timeout=left, return_when=asyncio.FIRST_COMPLETED)


class _BroadcastingSender:
    """A sender whose buckets are also broadcast to other nodes."""

    def __init__(self, transport: CollectiveTransport, sender: Sender):
        self._transport, self._sender = transport, sender

    async def begin_export(self, version: int, base: int | None) -> None:
        await self._transport.prepare()
        await self._sender.begin_export(version, base)

    async def send_as(self, dtypes: Mapping[str, str]) -> None:
        await self._sender.send_as(dtypes)

    async def next_bucket(self) -> Bucket:
        bucket = await self._sender.next_bucket()
        self._transport.send(bucket)
        return bucket

    async def finish_export(self) -> ExportReport:
        return await self._sender.finish_export()

    async def abort_export(self) -> None:
        await asyncio.gather(self._transport.wait_idle(), self._sender.abort_export())


class _RemoteReceiver:
    """A receiver on another node than the sender."""

    def __init__(self, transport: CollectiveTransport, receiver: Receiver, node: Node):
        self._transport, self._receiver, self._node = transport, receiver, node

    async def begin_update(self, version: int, base: int | None) -> None:
        await self._receiver.begin_update(version, base)

    async def load_bucket(self, bucket: Bucket) -> BucketReport:
        segment = await self._transport.segment(bucket, self._node)
        # A copy keeps the additional fields of a DeltaBucket.
        return await self._receiver.load_bucket({**bucket, "segment": segment})

    async def finish_update(self, manifest: ManifestMessage) -> EngineReport:
        return await self._receiver.finish_update(manifest)

    async def abort_update(self, reason: str) -> None:
        await self._receiver.abort_update(reason)

    async def parameter_hashes(self) -> list[dict[str, str]]:
        return await self._receiver.parameter_hashes()
