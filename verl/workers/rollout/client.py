"""Routes requests to replicas: the same conversation to the same replica, a new one to the least busy.

An answer that a weight update cut goes on from the tokens it has; who asked for it sees one answer.
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

# Conversations remembered for stickiness; the least recently used one is forgotten first.
_MAX_SESSIONS = 10_000


class LLMServerClient:
    """Token-in token-out access to all replicas.

    Args:
        replicas: where to send requests.
    """

    def __init__(self, replicas: ReplicaSet):
        self._replicas = replicas
        self._sessions: OrderedDict[str, vLLMReplica] = OrderedDict()
        self.retries = 0
        self.cuts = 0

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], *, session: str | None = None
    ) -> TokenOutput:
        """Generate one answer, on another replica where the first one dies, in parts where updates cut it.

        Args:
            prompt_ids: prompt tokens.
            sampling_params: vLLM's sampling parameters by name.
            session: requests of one session go to the same replica, whose prefix cache knows them.

        Raises:
            NoReplicaLeft: every replica is dead or refuses.
        """
        refused: dict[int, str] = {}
        answer = TokenOutput(token_ids=[])
        while True:
            replica = self._choose(session, refused)
            try:
                part = await replica.generate(prompt_ids, sampling_params, uuid.uuid4().hex, answer.token_ids)
            except ReplicaUnavailable as error:
                logger.warning("%s; trying another replica", error)
                refused[replica.rank] = str(error)
                self.retries += 1
                if session is not None:
                    self._sessions.pop(session, None)
                continue
            answer = joined(answer, part)
            if part.stop_reason != "abort":
                return answer
            self.cuts += 1
            # Whoever refused before the update may serve after it.
            refused.clear()

    def _choose(self, session: str | None, refused: dict[int, str]) -> vLLMReplica:
        candidates = [replica for replica in self._replicas.alive if replica.rank not in refused]
        if not candidates:
            reasons = "; ".join(refused.values()) or "none was started"
            raise NoReplicaLeft(f"no replica of {len(self._replicas.replicas)} answers: {reasons}")
        known = self._sessions.get(session) if session is not None else None
        chosen = known if known in candidates else min(candidates, key=lambda replica: replica.in_flight)
        if session is not None:
            self._sessions[session] = chosen
            self._sessions.move_to_end(session)
            if len(self._sessions) > _MAX_SESSIONS:
                self._sessions.popitem(last=False)
        return chosen
