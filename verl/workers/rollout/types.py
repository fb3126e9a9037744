"""Types that a rollout replica and its callers exchange."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

from verl.utils.sampling_masks import SamplingMasks


@dataclass
class TokenOutput:
    """One response of a replica, or a part of one.

    Attributes:
        token_ids: generated tokens, including the end-of-sequence token if the model generated it.
        log_probs: natural log-probability of each token under the distribution that it was sampled from (after
            temperature, top-p and top-k); empty if not requested.
        stop_reason: `stop` (end of sequence or a stop token), `length` (token limit), or, from a replica, `abort`: cut
            by a weight update.
        weight_versions: version of the weights that generated each token.
        sampling_masks: the tokens that each token was sampled from, with `rollout.replay_sampling_mask` and if
            log-probabilities are requested; otherwise empty.
        prompt_log_probs: natural log-probability of each prompt token but the first under the model, at temperature 1;
            empty unless the sampling parameter `prompt_logprobs` is 0.
    """

    token_ids: list[int]
    log_probs: list[float] = field(default_factory=list)
    stop_reason: str = "stop"
    weight_versions: list[int] = field(default_factory=list)
    sampling_masks: SamplingMasks = field(default_factory=lambda: SamplingMasks.full(0))
    prompt_log_probs: list[float] = field(default_factory=list)


class ReplicaReport(TypedDict):
    """Report of a started replica: seconds of the start, process id, base address and key of the HTTP endpoint."""

    seconds: float
    pid: int
    http: str | None
    api_key: str | None


class ReplicaHealth(TypedDict):
    """State of a replica: the version that it serves, or the reason why it refuses; either may be None."""

    version: int | None
    refusal: str | None


class ReplicaUnavailable(RuntimeError):
    """A replica died or refuses to serve. The request may be sent to another one."""


class EngineDied(ReplicaUnavailable):
    """The engine of a replica died; its server process may still run."""


class NoReplicaLeft(RuntimeError):
    """Every replica is dead or refuses to serve."""
