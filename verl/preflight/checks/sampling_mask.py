"""Checks of `actor_rollout_ref.rollout.replay_sampling_mask` against the sampling and the engine's arguments."""

from __future__ import annotations

from verl.config.ppo import PPOConfig
from verl.config.rollout import MAX_REPLAYED_TOP_K, RolloutConfig
from verl.preflight.findings import Findings
from verl.utils.sampling_masks import candidates_for_top_k

_ROLLOUT = "actor_rollout_ref.rollout"
_REPLAY = f"{_ROLLOUT}.replay_sampling_mask=True"
_ENGINE = f"{_ROLLOUT}.engine_kwargs.vllm"


def check_sampling_mask(config: PPOConfig, found: Findings) -> None:
    """Check that sampling is truncated to a bounded number of tokens, and that the engine returns all of them."""
    rollout = config.actor_rollout_ref.rollout
    if not rollout.replay_sampling_mask:
        return
    _check_truncation(rollout, found)
    if not rollout.calculate_log_probs:
        found.errors.append(
            f"{_ROLLOUT}.calculate_log_probs=False with {_REPLAY}: the masks come with the log-probabilities of the "
            "engine; set it to True"
        )
    engine = rollout.engine_kwargs.get("vllm") or {}
    mode = engine.get("logprobs_mode", rollout.logprobs_mode)
    if mode != "processed_logprobs":
        key = f"{_ENGINE}.logprobs_mode" if "logprobs_mode" in engine else f"{_ROLLOUT}.logprobs_mode"
        found.errors.append(
            f"{key}={mode} with {_REPLAY}: the masks are the tokens with a processed log-probability; use "
            "processed_logprobs"
        )
    if engine.get("speculative_config"):
        found.errors.append(
            f"{_ENGINE}.speculative_config={engine['speculative_config']} with {_REPLAY}: not supported, because a "
            "draft model proposes tokens from another distribution; remove one of the two"
        )
    needed, given = candidates_for_top_k(rollout.top_k), engine.get("max_logprobs")
    if given is not None and 0 <= given < needed:
        found.errors.append(
            f"{_ENGINE}.max_logprobs={given} with {_REPLAY}: {_ROLLOUT}.top_k={rollout.top_k} needs the "
            f"log-probabilities of {needed} tokens; remove max_logprobs, which is set automatically"
        )


def _check_truncation(rollout: RolloutConfig, found: Findings) -> None:
    top_k = f"{_ROLLOUT}.top_k={rollout.top_k}"
    if rollout.top_k <= 0:
        if rollout.top_p == 1:
            found.errors.append(
                f"{_REPLAY} with {_ROLLOUT}.top_p=1 and {top_k}: the engine samples from all tokens, so there is no "
                "mask; set replay_sampling_mask=False, or top_k and top_p"
            )
        else:
            found.errors.append(
                f"{top_k} with {_REPLAY}: {_ROLLOUT}.top_p={rollout.top_p} alone may keep the whole vocabulary, and "
                f"the engine returns a bounded number of tokens; set top_k to 1 to {MAX_REPLAYED_TOP_K}, for example "
                "100; the smaller, the cheaper"
            )
    elif rollout.top_k > MAX_REPLAYED_TOP_K:
        found.errors.append(
            f"{top_k} with {_REPLAY}: the engine would return at least as many log-probabilities for each token; use "
            f"at most {MAX_REPLAYED_TOP_K}"
        )
