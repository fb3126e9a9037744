"""Which models a run has, under upstream verl's names; `verl.config.roles` has the implementation."""

from verl.config.ppo import PPOConfig
from verl.config.roles import needs_critic, needs_ref
from verl.extension.upstream_names import missing_names

__all__ = ["need_critic", "need_reference_policy"]
__getattr__ = missing_names(__name__)


def need_reference_policy(config: PPOConfig) -> bool:
    """Return True if the run holds a reference model."""
    return needs_ref(config)


def need_critic(config: PPOConfig) -> bool:
    """Return True if the run trains a critic."""
    return needs_critic(config)
