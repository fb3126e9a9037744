"""Continuation of a response after a cut, such that its parts equal the result of one request.

A weight update ends a response at its current token (`stop_reason` "abort"). The next request is prompt + tokens so
far: the engine recomputes their keys and values under the new weights, and counters of sampling parameters continue.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from verl.workers.rollout.types import TokenOutput

# Parameters that look at one token at a time, or treat prompt and response alike, and those that `after_cut` adjusts.
_CONTINUABLE = frozenset(
    (
        *("temperature", "top_p", "top_k", "min_p", "logprobs", "logit_bias", "allowed_token_ids"),
        *("stop_token_ids", "ignore_eos", "repetition_penalty", "max_tokens", "min_tokens", "seed"),
    )
)


def check_continuable(sampling: Mapping[str, Any]) -> None:
    """Check that a response with these sampling parameters may be cut.

    Raises:
        ValueError: a parameter has a state (penalties that count the response's tokens, grammars, ...), which a second
            request would reset.
    """
    if others := sorted(set(sampling) - _CONTINUABLE):
        raise ValueError(
            f"sampling parameters {', '.join(others)}: not supported with partial rollouts, because a response that a "
            "weight update cuts could not continue; remove them, or set actor_rollout_ref.rollout.partial_rollout=False"
        )


def after_cut(sampling: Mapping[str, Any], num_generated: int) -> dict[str, Any]:
    """Return the sampling parameters for the rest of a response.

    Args:
        sampling: parameters of the full response, with `max_tokens`.
        num_generated: tokens generated so far, fewer than `max_tokens`.
    """
    if num_generated == 0:
        return dict(sampling)
    rest = {**sampling, "max_tokens": sampling["max_tokens"] - num_generated}
    if rest.get("min_tokens"):
        rest["min_tokens"] = max(0, rest["min_tokens"] - num_generated)
    if rest.get("seed") is not None:
        # The same seed would repeat the random numbers of the first part.
        digest = hashlib.blake2b(f"{rest['seed']}/{num_generated}".encode(), digest_size=4).digest()
        rest["seed"] = int.from_bytes(digest, "big")
    return rest


def joined(so_far: TokenOutput, rest: TokenOutput) -> TokenOutput:
    """Join two parts of a response. Every token keeps its log-probability, weight version and mask."""
    return TokenOutput(
        token_ids=so_far.token_ids + rest.token_ids,
        prompt_log_probs=so_far.prompt_log_probs or rest.prompt_log_probs,
        log_probs=so_far.log_probs + rest.log_probs,
        stop_reason=rest.stop_reason,
        weight_versions=so_far.weight_versions + rest.weight_versions,
        sampling_masks=so_far.sampling_masks + rest.sampling_masks,
    )
