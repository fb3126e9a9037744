"""`algorithm`: computation of advantages from rewards."""

# ruff: noqa: RUF009  (key, unsupported and section return dataclass fields)
from __future__ import annotations

from dataclasses import dataclass

from verl.config import names
from verl.config.conditions import any_of, read_by_estimator, when
from verl.config.rollout_correction import RolloutCorrectionConfig
from verl.config.schema import ConfigSection, key, section, unsupported

__all__ = ["AlgorithmConfig", "FilterGroupsConfig", "KLCtrlConfig", "RolloutCorrectionConfig"]


@dataclass
class KLCtrlConfig(ConfigSection):
    """Weight of the KL penalty in the reward."""

    type: str = key(
        "fixed",
        "fixed: kl_coef is constant; adaptive: a controller changes it so that the KL approaches target_kl",
        choices=("fixed", "adaptive"),
    )
    kl_coef: float = key(0.001, "weight of the KL penalty; adaptive: its first value", at_least=0)
    horizon: int = key(
        10000,
        "adaptive: time constant of the controller",
        unit="samples",
        at_least=1,
        only_with=when("type", "adaptive"),
    )
    target_kl: float = key(
        0.1, "adaptive: target of the mean KL per token", above=0, only_with=when("type", "adaptive")
    )


@dataclass
class FilterGroupsConfig(ConfigSection):
    """Dynamic sampling (DAPO): drop groups whose samples all have the same score, and generate other groups instead."""

    enable: bool = key(False, "drop such groups, and generate until the batch of the step is full of other groups")
    metric: str | None = key(
        None,
        "value that must differ within a group: seq_reward, seq_final_reward, or a number that the reward function "
        "returns, such as acc",
    )
    max_num_gen_batches: int = key(0, "maximum batches of prompts to generate per step; 0: no limit", at_least=0)


@dataclass
class AlgorithmConfig(ConfigSection):
    """Computation of advantages from rewards."""

    adv_estimator: str = key(
        "gae",
        "advantage estimator; gae needs a critic, and remax generates one more greedy response per prompt",
        choices=tuple(names.ADV_ESTIMATORS),
    )
    norm_adv_by_std_in_grpo: bool = key(
        True,
        "divide advantages by the standard deviation of their group; False: Dr. GRPO",
        only_with=read_by_estimator,
    )
    gdpo_reward_keys: list[str] | None = key(
        None,
        "gdpo: names of the rewards to normalize separately; the reward function returns them beside its score",
        only_with=any_of(
            read_by_estimator,
            when("reward.reward_manager.name", "gdpo"),
            reason="with algorithm.adv_estimator={adv_estimator} and without the gdpo reward manager",
        ),
    )
    gdpo_reward_weights: list[float] | None = key(
        None, "gdpo: weights of these rewards; null: all weights are 1", only_with=read_by_estimator
    )
    gamma: float = key(
        1.0,
        "discount factor per token; gae and reinforce_plus_plus read it",
        above=0,
        at_most=1,
        only_with=read_by_estimator,
    )
    lam: float = key(
        1.0,
        "gae: trade-off between bias (0) and variance (1)",
        at_least=0,
        at_most=1,
        only_with=read_by_estimator,
    )
    use_kl_in_reward: bool = key(
        False, "subtract the KL divergence from the reference model from the reward of each token"
    )
    kl_penalty: str = key(
        "kl",
        "estimator of the KL penalty in the reward",
        choices=names.KL_TYPES,
        unsupported=names.UNSUPPORTED_KL_TYPES,
        use="use kl",
        only_with=when("use_kl_in_reward"),
    )
    kl_ctrl: KLCtrlConfig = section(
        KLCtrlConfig, "weight of the KL penalty in the reward", only_with=when("use_kl_in_reward")
    )
    filter_groups: FilterGroupsConfig = section(
        FilterGroupsConfig,
        "dynamic sampling (DAPO): groups whose samples all have the same score are dropped",
        only_with=when("algorithm.filter_groups.enable"),
    )
    rollout_correction: RolloutCorrectionConfig = section(
        RolloutCorrectionConfig, "importance weights and rejection that correct differences of rollout and trainer"
    )
    use_pf_ppo: bool = unsupported(False, "PF-PPO")
