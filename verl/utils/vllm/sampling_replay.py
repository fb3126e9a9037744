"""Sampling masks from vLLM: the tokens that remained after top-k, top-p and min-p.

With `logprobs_mode=processed_logprobs`, a removed token has the log-probability -inf. A request with masks asks for the
log-probabilities of more tokens than top-k keeps, so that all kept tokens are among them and the masks are exact.

vLLM's `return_sampling_mask` is not used. It needs vLLM's second model runner, which a CPU does not have, and an engine
with it refuses greedy requests, such as those of validation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from verl.utils.sampling_masks import SamplingMasks, candidates_for_top_k

# Probability that float32 loses in a sum of probabilities.
_ROUNDING = 2.0**-24


class SamplingReplay:
    """Reads the masks of the requests whose sampling is truncated.

    Args:
        max_top_k: largest top-k of a request, for which the engine was started.
        vocab_size: number of tokens of the model.
    """

    def __init__(self, max_top_k: int, vocab_size: int):
        self._max_top_k, self._vocab_size = max_top_k, vocab_size

    def candidates(self, sampling: Mapping[str, Any]) -> int:
        """Return the number of tokens whose log-probabilities a request must ask for; 0 if it needs no mask.

        A request needs masks if it samples from a part of the vocabulary and asks for log-probabilities.

        Args:
            sampling: sampling parameters by vLLM's names.

        Raises:
            ValueError: the sampling is truncated without a limit of the number of tokens, or above `max_top_k`.
        """
        top_k = sampling.get("top_k") or 0
        truncated = top_k > 0 or (sampling.get("top_p") or 1.0) < 1 or (sampling.get("min_p") or 0) > 0
        if sampling.get("logprobs") is None or sampling.get("temperature", 1.0) == 0 or not truncated:
            return 0
        if not 0 < top_k <= self._max_top_k:
            given = {name: sampling[name] for name in ("top_k", "top_p", "min_p") if name in sampling}
            raise ValueError(
                f"sampling parameters {given} with actor_rollout_ref.rollout.replay_sampling_mask=True: the engine "
                f"returns masks of requests with a top_k of 1 to {self._max_top_k}, the value of "
                "actor_rollout_ref.rollout.top_k; use such a top_k in the agent loop, or raise that key"
            )
        return min(candidates_for_top_k(top_k), self._vocab_size)

    def read(self, output: Any, candidates: int) -> tuple[list[float], SamplingMasks]:
        """Return the log-probabilities and the masks of the generated tokens.

        Args:
            output: vLLM's completion of a request with `flat_logprobs`.
            candidates: as returned by `candidates` for the request; at least 1.

        Raises:
            ValueError: more tokens remained than the engine returned, because of equal logits.
        """
        flat = output.logprobs
        # Each position has its sampled token, and after it the most likely tokens in descending order.
        ids = np.array(flat.token_ids, np.int32).reshape(-1, candidates + 1)
        log_probs = np.array(flat.logprobs, np.float64).reshape(-1, candidates + 1)
        kept = log_probs[:, 1:] > -math.inf
        if candidates < self._vocab_size:
            # A full row may lack tokens, each of them at most as likely as its last token.
            lost = np.where(kept[:, -1], (self._vocab_size - candidates) * np.exp(log_probs[:, -1]), 0.0)
            if (lost > _ROUNDING).any():
                raise ValueError(
                    f"the engine kept more than {candidates} tokens at a position, because tokens have equal logits: "
                    "the sampling mask would be incomplete. Lower actor_rollout_ref.rollout.top_p or .top_k, use "
                    "actor_rollout_ref.rollout.dtype=float32, or set .replay_sampling_mask=False"
                )
        return log_probs[:, 0].tolist(), SamplingMasks(ids[:, 1:][kept], kept.sum(axis=1, dtype=np.int32))
