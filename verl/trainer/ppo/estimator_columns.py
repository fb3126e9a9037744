"""The batch columns that an advantage estimator reads, compared with the columns that the run has."""

from __future__ import annotations

from verl.algorithms.advantages import get_adv_estimator_fn, required_columns
from verl.config import PPOConfig
from verl.config.old_log_probs import PREFIX as REUSE
from verl.config.roles import needs_critic, needs_ref
from verl.config.rollout_correction import Correction

# Tensor columns of every batch when advantages are computed. `reward_baselines` is generated if an estimator reads it.
COMMON_COLUMNS = (
    *("prompts", "responses", "input_ids", "attention_mask", "position_ids", "response_mask", "weight_versions"),
    *("token_level_scores", "token_level_rewards", "reward_baselines"),
)


def estimator_columns(config: PPOConfig, correction: Correction) -> tuple[str, ...]:
    """Return the columns that `algorithm.adv_estimator` requires.

    Args:
        config: the whole config.
        correction: the rollout correction of the run.

    Raises:
        ValueError: this run never has one of them.
    """
    name = config.algorithm.adv_estimator
    required = required_columns(get_adv_estimator_fn(name))
    bypass, with_log_probs = correction.bypass_mode, config.actor_rollout_ref.rollout.calculate_log_probs
    reuse = config.actor_rollout_ref.actor.old_log_probs_from_rollout.enable
    available = {
        *COMMON_COLUMNS,
        "old_log_probs",
        *(("rollout_log_probs",) if with_log_probs else ()),
        *(() if bypass or reuse else ("entropys", "sum_pi_squared")),
        *(("ref_log_prob",) if needs_ref(config) else ()),
        *(("values",) if needs_critic(config) else ()),
        *(("rollout_is_weights",) if correction.rollout_is and not bypass else ()),
    }
    if missing := [column for column in required if column not in available]:
        hint = "; set critic.enable=True for values" if "values" in missing else ""
        if reuse and not {"entropys", "sum_pi_squared"}.isdisjoint(missing):
            hint += f"; set {REUSE}enable=False for columns of the trainer's forward pass"
        raise ValueError(
            f"algorithm.adv_estimator={name} requires the columns {', '.join(missing)}, but this run has only "
            f"{', '.join(sorted(available))}{hint}"
        )
    return required
