"""vLLM's sampling parameters of one request, from those that an agent loop gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from verl.config.rollout import MIN_TEMPERATURE
from verl.workers.rollout.continuation import after_cut, check_continuable

if TYPE_CHECKING:
    from vllm import SamplingParams

# Parameters with one right value, and the reason.
_OWN = {
    "detokenize": "the engine returns tokens, and turns them into text only to find stop strings",
    "output_kind": "a response is returned when it is complete",
    "n": "a request is one sample; send more requests",
}


def vllm_sampling_params(
    given: Mapping[str, Any],
    *,
    max_tokens: int,
    room: int,
    num_generated: int,
    partial_rollout: bool,
    candidates: int = 0,
) -> SamplingParams:
    """Return the parameters of a request.

    With stop strings (`stop`), a response ends with the token that completes the string, which belongs to the response.

    Args:
        given: parameters by vLLM's names; `max_tokens` is of the full response.
        max_tokens: limit if `given` has none.
        room: tokens that fit into the context.
        num_generated: tokens of the response before a cut.
        partial_rollout: a weight update may cut the response.
        candidates: most likely tokens whose log-probabilities the sampling masks need; 0 without masks.

    Raises:
        ValueError: unknown or unsupported parameters, or a value that vLLM rejects or would change.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    for name, reason in _OWN.items():
        if name in given:
            raise ValueError(f"sampling parameter {name}={given[name]!r}: cannot be set, because {reason}; remove it")
    temperature = given.get("temperature", 1.0)
    if 0 < temperature < MIN_TEMPERATURE:
        raise ValueError(
            f"sampling parameter temperature={temperature}: vLLM would sample at {MIN_TEMPERATURE} instead; use "
            f"{MIN_TEMPERATURE} or more, or 0 for greedy decoding"
        )
    if partial_rollout:
        check_continuable(given)
    merged = {"max_tokens": max_tokens} | dict(given)
    merged["max_tokens"] = min(merged["max_tokens"], room)
    if candidates:
        # The flat format has no object per candidate.
        merged |= {"logprobs": candidates, "flat_logprobs": True}
    try:
        return SamplingParams(
            **after_cut(merged, num_generated),
            detokenize=bool(given.get("stop")),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
    except TypeError as error:
        raise ValueError(f"sampling parameters {sorted(given)}: {error}") from error
