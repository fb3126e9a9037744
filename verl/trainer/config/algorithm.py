"""`algorithm`: from rewards to advantages."""

# ruff: noqa: RUF009  (key, planned and section make dataclass fields)
from __future__ import annotations

from dataclasses import dataclass

from verl.trainer.config import names
from verl.trainer.config.rollout_correction import RolloutCorrectionConfig
from verl.trainer.config.schema import key, planned, section

_KL_LOSS = "use actor_rollout_ref.actor.use_kl_loss=True"


@dataclass
class KLCtrlConfig:
    """Weight of a KL term in the reward."""

    type: str = planned("fixed", "KL in the reward", _KL_LOSS)
    kl_coef: float = planned(0.001, "KL in the reward", _KL_LOSS)
    horizon: int = planned(10000, "KL in the reward", _KL_LOSS)
    target_kl: float = planned(0.1, "KL in the reward", _KL_LOSS)


@dataclass
class FilterGroupsConfig:
    """Dropping groups whose samples all scored the same (DAPO)."""

    enable: bool = planned(False, "group filtering")
    metric: str | None = planned(None, "group filtering")
    max_num_gen_batches: int = planned(0, "group filtering")


@dataclass
class AlgorithmConfig:
    """From rewards to advantages."""

    adv_estimator: str = key(
        "gae",
        "advantage estimator; set it to grpo",
        choices=names.ADV_ESTIMATORS,
        planned=names.PLANNED_ADV_ESTIMATORS,
        use="use grpo",
    )
    norm_adv_by_std_in_grpo: bool = key(True, "divide by the group's standard deviation; False is Dr. GRPO")
    gamma: float = key(1.0, "discount of later rewards, per token; no part of grpo", above=0, at_most=1)
    lam: float = key(1.0, "GAE's trade-off of bias and variance; no part of grpo", at_least=0, at_most=1)
    use_kl_in_reward: bool = planned(False, "KL in the reward", _KL_LOSS)
    kl_penalty: str = planned("kl", "KL in the reward", _KL_LOSS)
    kl_ctrl: KLCtrlConfig = section(KLCtrlConfig, "weight of a KL term in the reward: not supported yet")
    filter_groups: FilterGroupsConfig = section(FilterGroupsConfig, "group filtering: not supported yet")
    rollout_correction: RolloutCorrectionConfig = section(
        RolloutCorrectionConfig, "importance weights and rejection between rollout and trainer"
    )
    use_pf_ppo: bool = planned(False, "PF-PPO")
