"""What crosses the line between the trainer and a rollout replica."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class TokenOutput:
    """One answer of a replica.

    Attributes:
        token_ids: generated tokens, the end-of-sequence token included where the model made it.
        log_probs: log-probability of each token under the distribution it was sampled from (after temperature, top-p
            and top-k), natural log; empty where they were not asked for.
        stop_reason: `stop` (end of sequence or a stop token), `length` (token cap), or, from a replica, `abort`: cut
            short by a weight update.
        weight_versions: version of the weights that made each token.
    """

    token_ids: list[int]
    log_probs: list[float] = field(default_factory=list)
    stop_reason: str = "stop"
    weight_versions: list[int] = field(default_factory=list)


class ReplicaUnavailable(RuntimeError):
    """A replica died or serves nothing; the request may be tried on another one."""


class NoReplicaLeft(RuntimeError):
    """Every replica is dead or out of service."""
