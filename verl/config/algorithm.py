"""`algorithm`: from rewards to advantages."""

# ruff: noqa: RUF009  (key, planned and section make dataclass fields)
from __future__ import annotations

from dataclasses import dataclass

from verl.config import names
from verl.config.rollout_correction import RolloutCorrectionConfig
from verl.config.schema import key, planned, section


@dataclass
class KLCtrlConfig:
    """Weight of the KL penalty in the reward."""

    type: str = key(
        "fixed", "fixed: kl_coef stays; adaptive: it is steered towards target_kl", choices=("fixed", "adaptive")
    )
    kl_coef: float = key(0.001, "weight of the KL penalty, the first one where it is adaptive", at_least=0)
    horizon: int = key(10000, "samples over which an adaptive weight reacts", unit="samples", at_least=1)
    target_kl: float = key(0.1, "mean KL per token that an adaptive weight aims at", above=0)


@dataclass
class FilterGroupsConfig:
    """Dropping groups whose samples all scored the same, and generating others in their place (DAPO)."""

    enable: bool = key(False, "drop such groups and generate until a step's batch is full of others")
    metric: str | None = key(
        None, "what must differ: seq_reward, seq_final_reward, or a number that the reward function returns, e.g. acc"
    )
    max_num_gen_batches: int = key(
        0, "batches of prompts to generate for one step, at most; 0 for no limit", at_least=0
    )


@dataclass
class AlgorithmConfig:
    """From rewards to advantages."""

    adv_estimator: str = key(
        "gae",
        "advantage estimator; gae needs a critic, remax a greedy answer more a prompt, the others neither",
        choices=names.ADV_ESTIMATORS,
    )
    norm_adv_by_std_in_grpo: bool = key(True, "divide by the group's standard deviation; False is Dr. GRPO")
    gdpo_reward_keys: list[str] | None = key(
        None, "gdpo: names of the rewards to normalise one by one, which the reward function returns beside its score"
    )
    gdpo_reward_weights: list[float] | None = key(None, "gdpo: weights of those rewards; null for 1 each")
    gamma: float = key(1.0, "discount of later rewards, per token; no part of grpo", above=0, at_most=1)
    lam: float = key(1.0, "GAE's trade-off of bias and variance; no part of grpo", at_least=0, at_most=1)
    use_kl_in_reward: bool = key(False, "take the KL divergence from the reference model off each token's reward")
    kl_penalty: str = key(
        "kl",
        "its estimator",
        choices=names.KL_TYPES,
        planned=names.UNSUPPORTED_KL_TYPES,
        use="use kl",
    )
    kl_ctrl: KLCtrlConfig = section(KLCtrlConfig, "weight of the KL penalty in the reward")
    filter_groups: FilterGroupsConfig = section(
        FilterGroupsConfig, "dropping groups whose samples all scored the same (DAPO)"
    )
    rollout_correction: RolloutCorrectionConfig = section(
        RolloutCorrectionConfig, "importance weights and rejection between rollout and trainer"
    )
    use_pf_ppo: bool = planned(False, "PF-PPO")
