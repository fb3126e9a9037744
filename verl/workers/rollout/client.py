"""Routing of requests to replicas: a conversation stays on its replica, a new one goes to the least busy replica.

A response that a weight update cut continues from its current tokens; the caller sees one response.
"""

from __future__ import annotations

import logging
import uuid
from collections import OrderedDict
from typing import Any

from verl.workers.rollout.continuation import joined
from verl.workers.rollout.replica import ReplicaSet, vLLMReplica
from verl.workers.rollout.types import NoReplicaLeft, ReplicaUnavailable, TokenOutput

logger = logging.getLogger(__name__)

# Limit of remembered conversations; the least recently used one is dropped first.
_MAX_SESSIONS = 10_000


class LLMServerClient:
    """Token-in token-out access to all replicas.

    Args:
        replicas: receivers of the requests.
    """

    def __init__(self, replicas: ReplicaSet):
        self._replicas = replicas
        self._sessions: OrderedDict[str, vLLMReplica] = OrderedDict()
        self._warned: dict[int, str] = {}
        self.retries = 0
        self.cuts = 0

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], *, session: str | None = None
    ) -> TokenOutput:
        """Generate one response: on another replica if the first one dies, in several parts if updates cut it.

        Args:
            prompt_ids: prompt tokens.
            sampling_params: vLLM's sampling parameters by name.
            session: requests of one session go to the same replica, whose prefix cache contains their prefix.

        Raises:
            NoReplicaLeft: every replica is dead or refuses to serve.
        """
        refused: dict[int, str] = {}
        response = TokenOutput(token_ids=[])
        recovery = self._replicas.recovery
        while True:
            changes = 0 if recovery is None else recovery.changes
            replica = self._choose(session, refused)
            if replica is None:
                if recovery is None or not await recovery.wait_for_replica(changes):
                    reasons = "; ".join(refused.values()) or "no replica was started"
                    raise NoReplicaLeft(f"none of {len(self._replicas.replicas)} replica(s) responds: {reasons}")
                refused.clear()
                continue
            try:
                part = await replica.generate(prompt_ids, sampling_params, uuid.uuid4().hex, response.token_ids)
            except ReplicaUnavailable as error:
                self._warn_once(replica, str(error))
                refused[replica.rank] = str(error)
                self.retries += 1
                if session is not None:
                    self._sessions.pop(session, None)
                continue
            response = joined(response, part)
            if part.stop_reason != "abort":
                return response
            self.cuts += 1
            # A replica that refused before the update may serve after it.
            refused.clear()

    def _warn_once(self, replica: vLLMReplica, reason: str) -> None:
        """Log the failure of a replica once for all of its requests, unless a recovery reports it."""
        if self._replicas.recovery is not None or self._warned.get(replica.rank) == reason:
            return
        self._warned[replica.rank] = reason
        if others := len(self._replicas.serving) - replica.alive:
            logger.warning("%s; its requests are sent to %d other replica(s)", reason, others)
        else:
            logger.warning("%s; there is no other replica", reason)

    def _choose(self, session: str | None, refused: dict[int, str]) -> vLLMReplica | None:
        candidates = [replica for replica in self._replicas.serving if replica.rank not in refused]
        if not candidates:
            return None
        known = self._sessions.get(session) if session is not None else None
        chosen = known if known in candidates else min(candidates, key=lambda replica: replica.in_flight)
        if session is not None:
            self._sessions[session] = chosen
            self._sessions.move_to_end(session)
            if len(self._sessions) > _MAX_SESSIONS:
                self._sessions.popitem(last=False)
        return chosen
