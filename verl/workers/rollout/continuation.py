"""An answer in parts: what is asked for after a cut, so that the parts together are what one request would have given.

A weight update ends an answer where it is (`stop_reason` "abort"); the next request is prompt + tokens so far. Its keys
and values are computed anew under the new weights, and what a sampling parameter counts goes on from the tokens so far.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from verl.workers.rollout.types import TokenOutput

# Those that look at one token at a time, or at prompt and answer alike, and those that `after_cut` carries on.
_CONTINUABLE = frozenset(
    (
        *("temperature", "top_p", "top_k", "min_p", "logprobs", "logit_bias", "allowed_token_ids"),
        *("stop_token_ids", "ignore_eos", "repetition_penalty", "max_tokens", "min_tokens", "seed"),
    )
)


def check_continuable(sampling: Mapping[str, Any]) -> None:
    """Whether an answer sampled like this could be cut.

    Raises:
        ValueError: a parameter with a state of its own (penalties that count the answer's tokens, grammars, ...), which
            a second request would begin anew.
    """
    if others := sorted(set(sampling) - _CONTINUABLE):
        raise ValueError(
            f"sampling parameters {', '.join(others)}: an answer that a weight update cuts could not go on with them; "
            "leave them out, or set actor_rollout_ref.rollout.partial_rollout=False"
        )


def after_cut(sampling: Mapping[str, Any], answered: int) -> dict[str, Any]:
    """The sampling parameters of the rest of an answer.

    Args:
        sampling: of the whole answer; `max_tokens` is set.
        answered: tokens it has already; fewer than `max_tokens`.
    """
    if answered == 0:
        return dict(sampling)
    rest = {**sampling, "max_tokens": sampling["max_tokens"] - answered}
    if rest.get("min_tokens"):
        rest["min_tokens"] = max(0, rest["min_tokens"] - answered)
    if rest.get("seed") is not None:
        # The same seed would draw the numbers of the first part once more.
        digest = hashlib.blake2b(f"{rest['seed']}/{answered}".encode(), digest_size=4).digest()
        rest["seed"] = int.from_bytes(digest, "big")
    return rest


def joined(so_far: TokenOutput, rest: TokenOutput) -> TokenOutput:
    """Two parts as one answer: every token keeps its log-probability and its weight version."""
    return TokenOutput(
        token_ids=so_far.token_ids + rest.token_ids,
        log_probs=so_far.log_probs + rest.log_probs,
        stop_reason=rest.stop_reason,
        weight_versions=so_far.weight_versions + rest.weight_versions,
    )
