"""Weight updates across nodes, seen from the driver: each bucket is broadcast once to every other node.

    sender --bucket k--> relay 0 ==broadcast==> relay 1 --bucket k in memory of node 1--> replicas of node 1
       (trainer's node)          ==broadcast==> relay n --bucket k in memory of node n--> replicas of node n

Replicas on the trainer's node read its shared memory, as without this. A sender and receivers that came through
`CollectiveTransport.connect` are used like any others: bucket k + 1 is filled while k travels and k - 1 is loaded.

The driver watches the clock. Whatever goes wrong, in a relay or between two of them, all relays are ended with the
update, and the next one starts new ones.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from verl.utils.timeline import span, spanned
from verl.workers.weight_sync.driver import Receiver, Sender
from verl.workers.weight_sync.manifest import WeightUpdateError
from verl.workers.weight_sync.transports.base import Node

logger = logging.getLogger(__name__)

# How long to look for the cause of a failure: those who lost a peer hear of it before it is known to be dead.
_GRACE_S = 5.0


class BroadcastProxyDied(RuntimeError):
    """A relay's process ended, or its node."""


class ProxyHandle(Protocol):
    """A `BroadcastProxy` somewhere else."""

    async def call(self, method: str, *arguments: Any) -> Any:
        """Return the method's result, or raise its error. `ready` answers during another call.

        Raises:
            BroadcastProxyDied: the process ended.
        """

    def end(self) -> None:
        """End the process at once, whatever it does."""


class CollectiveTransport:
    """The way to replicas on any node: the relays of a run.

    Args:
        start: starts a relay on a node.
        timeout_s: seconds that starting the relays, and each broadcast of a bucket, may take.
    """

    def __init__(self, start: Callable[[Node], ProxyHandle], *, timeout_s: float):
        self._start, self._timeout_s = start, timeout_s
        self._nodes: tuple[Node, ...] = ()
        self._joined: tuple[Node, ...] = ()
        self._relays: dict[Node, ProxyHandle] = {}
        self._buckets: dict[int, asyncio.Task[dict[Node, Any]]] = {}
        self._last: asyncio.Task[dict[Node, Any]] | None = None

    def connect(
        self, sender: Sender, home: Node, receivers: Sequence[tuple[Receiver, Node]]
    ) -> tuple[Sender, list[Receiver]]:
        """Who to update with in the place of `sender`, on the node `home`, and of `receivers`, each with its node."""
        remote = dict.fromkeys(node for _, node in receivers if node != home)
        if not remote:
            self.close()
            return sender, [receiver for receiver, _ in receivers]
        self._nodes = (home, *remote)
        return _BroadcastingSender(self, sender), [
            receiver if node == home else _RemoteReceiver(self, receiver, node) for receiver, node in receivers
        ]

    @spanned("update: relays")
    async def prepare(self) -> None:
        """Have a relay on every node that is needed, all of them connected.

        Raises:
            WeightUpdateError: naming the node that cannot take part.
        """
        self._buckets, self._last = {}, None
        home, nodes = self._nodes[0], self._nodes
        if self._joined == nodes:
            try:
                await self._together(dict.fromkeys(nodes, ("ready",)), _GRACE_S)
                return
            except WeightUpdateError as error:
                logger.warning("%s: starting the relays again", error)
        self.close()
        self._relays = {node: self._start(node) for node in nodes}
        await self._together(dict.fromkeys(nodes, ("ready",)))
        one_host = len({node.address for node in nodes}) == 1
        address = {node: "127.0.0.1" if one_host else node.address for node in nodes}
        # Twice the time, so that it is this clock that runs out, which knows who is silent.
        patience = 2 * self._timeout_s
        meeting = address[home], (await self._together({home: ("listen", address[home], patience)}))[home]
        joins = {n: ("join", rank, len(nodes), meeting, address[n], patience) for rank, n in enumerate(nodes)}
        await self._together(joins)
        self._joined = nodes

    def send(self, bucket: dict[str, Any]) -> None:
        """Let a bucket travel once those before it have arrived; `segment` waits for it."""
        if bucket["nbytes"]:
            self._last = asyncio.ensure_future(self._broadcast(self._last, bucket["segment"], int(bucket["nbytes"])))
            self._buckets[bucket["index"]] = self._last

    async def segment(self, bucket: dict[str, Any], node: Node) -> dict[str, Any] | None:
        """Where `bucket` lies on `node`, once it has arrived there."""
        if not bucket["nbytes"]:
            return bucket["segment"]
        # Several receivers wait for one bucket, and one that is cancelled must not take it from the others.
        return (await asyncio.shield(self._buckets[bucket["index"]]))[node]

    async def settle(self) -> None:
        """After an update that failed: let what travels arrive, or end the relays."""
        travelling = [task for task in self._buckets.values() if not task.done()]
        if travelling:
            _, late = await asyncio.wait(travelling, timeout=_GRACE_S)
            if late:
                self.close()
            for task in late:
                task.cancel()
        await asyncio.gather(*self._buckets.values(), return_exceptions=True)

    def close(self) -> None:
        """End every relay."""
        for relay in self._relays.values():
            relay.end()
        self._relays, self._joined = {}, ()

    async def _broadcast(
        self, before: asyncio.Task[dict[Node, Any]] | None, segment: dict[str, Any], nbytes: int
    ) -> dict[Node, Any]:
        if before is not None:
            await asyncio.shield(before)
        home, *others = self._nodes
        with span("update: broadcast a bucket", bytes=nbytes, nodes=len(others)):
            return await self._together({home: ("send", segment, nbytes), **dict.fromkeys(others, ("receive", nbytes))})

    async def _together(self, wanted: dict[Node, tuple[Any, ...]], patience: float | None = None) -> dict[Node, Any]:
        """Call a method of each node's relay at the same time; all results, or WeightUpdateError and no relay left.

        Args:
            patience: seconds that it may take, in the place of `timeout_s`.
        """
        patience = self._timeout_s if patience is None else patience
        calls = {node: asyncio.ensure_future(_call(self._relays.get(node), *call)) for node, call in wanted.items()}
        try:
            _, silent = await asyncio.wait(calls.values(), timeout=patience, return_when=asyncio.FIRST_EXCEPTION)
            if not silent and not any(call.exception() for call in calls.values()):
                return {node: call.result() for node, call in calls.items()}
            blame = await self._blame(calls, patience)
            self.close()
            raise WeightUpdateError(f"new weights do not cross nodes: {blame}")
        finally:
            await _cancel(calls.values())

    async def _blame(self, calls: dict[Node, asyncio.Future[Any]], patience: float) -> str:
        """Which nodes failed, and how: where some are dead those alone, since the others only lost them."""
        died = await _wait_for_a_death(calls)
        if died:
            return "; ".join(f"node {node}: {calls[node].exception()}" for node in died)
        errors = {node: call.exception() for node, call in calls.items() if call.done()}
        failed = [f"node {n}: {type(error).__name__}: {error}" for n, error in errors.items() if error is not None]
        if failed:
            return "; ".join(failed)
        # Those that wait for another one in the broadcast still answer this.
        probes = {
            node: asyncio.ensure_future(_call(self._relays.get(node), "ready"))
            for node, call in calls.items()
            if not call.done()
        }
        await asyncio.wait(probes.values(), timeout=_GRACE_S)
        dumb = [node for node, probe in probes.items() if not probe.done() or probe.exception() is not None]
        await _cancel(probes.values())
        return (
            f"no answer in {patience:g} s (actor_rollout_ref.rollout.checkpoint_engine.timeout) from node "
            + ", ".join(map(str, dumb or probes))
        )


async def _call(relay: ProxyHandle | None, method: str, *arguments: Any) -> Any:
    if relay is None:
        raise BroadcastProxyDied("its relay was ended")
    return await relay.call(method, *arguments)


async def _wait_for_a_death(calls: dict[Node, asyncio.Future[Any]]) -> list[Node]:
    """Nodes whose relay died. Where calls failed and none did, this may only not be known yet."""
    deadline = asyncio.get_running_loop().time() + _GRACE_S
    while True:
        errors = {node: call.exception() for node, call in calls.items() if call.done()}
        died = [node for node, error in errors.items() if isinstance(error, BroadcastProxyDied)]
        pending = [call for call in calls.values() if not call.done()]
        left = deadline - asyncio.get_running_loop().time()
        if died or not pending or left <= 0 or not any(errors.values()):
            return died
        await asyncio.wait(pending, timeout=left, return_when=asyncio.FIRST_COMPLETED)


async def _cancel(calls: Iterable[asyncio.Future[Any]]) -> None:
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


class _BroadcastingSender:
    """A sender whose buckets also travel to other nodes."""

    def __init__(self, transport: CollectiveTransport, sender: Sender):
        self._transport, self._sender = transport, sender

    async def begin_export(self, version: int, base: int | None) -> None:
        await self._transport.prepare()
        await self._sender.begin_export(version, base)

    async def next_bucket(self) -> dict[str, Any]:
        bucket = await self._sender.next_bucket()
        self._transport.send(bucket)
        return bucket

    async def finish_export(self) -> dict[str, Any]:
        return await self._sender.finish_export()

    async def abort_export(self) -> None:
        await asyncio.gather(self._transport.settle(), self._sender.abort_export())


class _RemoteReceiver:
    """A receiver on another node than the sender's."""

    def __init__(self, transport: CollectiveTransport, receiver: Receiver, node: Node):
        self._transport, self._receiver, self._node = transport, receiver, node

    async def begin_update(self, version: int, base: int | None) -> None:
        await self._receiver.begin_update(version, base)

    async def load_bucket(self, bucket: dict[str, Any]) -> None:
        segment = await self._transport.segment(bucket, self._node)
        await self._receiver.load_bucket({**bucket, "segment": segment})

    async def finish_update(self, manifest: dict[str, Any]) -> dict[str, Any]:
        return await self._receiver.finish_update(manifest)

    async def abort_update(self, reason: str) -> None:
        await self._receiver.abort_update(reason)

    async def parameter_hashes(self) -> list[dict[str, str]]:
        return await self._receiver.parameter_hashes()
