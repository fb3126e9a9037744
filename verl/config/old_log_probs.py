"""`actor_rollout_ref.actor.old_log_probs_from_rollout`: reuse of the engine's log-probabilities by the trainer."""

from __future__ import annotations

from dataclasses import dataclass

from verl.config.schema import ConfigSection, key

PREFIX = "actor_rollout_ref.actor.old_log_probs_from_rollout."


@dataclass
class OldLogProbsConfig(ConfigSection):
    """Reuse of the rollout's log-probabilities as `old_log_probs`, in steps in which a sample of them is right."""

    enable: bool = key(
        False,
        "in a step whose check succeeds, take old_log_probs from the rollout and skip the trainer's forward pass, "
        "except for samples with tokens from older weights",
    )
    sample_fraction: float = key(
        0.1, "share of the samples that the trainer computes to check the rollout's values", above=0, below=1
    )
    min_samples: int = key(8, "minimum number of samples in this check", unit="samples", at_least=1)
    max_difference: float = key(
        0.02,
        "the check succeeds up to this mean |difference| between the log-probabilities of rollout and trainer, "
        "in nats per token",
        above=0,
    )
    max_k3_kl: float = key(
        0.001,
        "the check succeeds up to this KL divergence between rollout and trainer (k3 estimate), in nats per token",
        above=0,
    )
