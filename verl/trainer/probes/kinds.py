"""The kinds of user code that a config contains. Imports no torch."""

from __future__ import annotations

from verl.config import PPOConfig, names

DATASET, REWARD, REWARD_MANAGER, ALGORITHMS, AGENT = "dataset", "reward", "reward_manager", "algorithms", "agent"

LABELS = {
    DATASET: "your dataset class",
    REWARD: "your reward function",
    REWARD_MANAGER: "your reward manager",
    ALGORITHMS: "your advantage estimator and policy loss",
    AGENT: "your agent loops and tools",
}


def user_code(config: PPOConfig, *, starting: bool) -> tuple[str, ...]:
    """Return the kinds to probe, in their order: the rows of a dataset are arguments of the others.

    Args:
        starting: the run starts now. It constructs agent loops and tools itself before any other process starts, so
            they are left out: their constructors may open files and connections.
    """
    rollout, reward = config.actor_rollout_ref.rollout, config.reward
    own_manager = reward.reward_manager.name not in names.REWARD_MANAGERS
    loops = rollout.agent.agent_loop_config_path, rollout.agent.default_agent_loop not in names.AGENT_LOOPS
    found = {
        DATASET: bool(config.data.custom_cls.path),
        # A manager calls the function with arguments of its choice.
        REWARD: reward.custom_reward_function.path is not None and not own_manager,
        REWARD_MANAGER: own_manager,
        ALGORITHMS: own_estimator(config) or own_loss(config),
        AGENT: not starting
        and any((*loops, rollout.multi_turn.tool_config_path, rollout.multi_turn.function_tool_path)),
    }
    return tuple(kind for kind, present in found.items() if present)


def own_estimator(config: PPOConfig) -> bool:
    """Return True if the advantage estimator is the user's."""
    return config.algorithm.adv_estimator not in names.ADV_ESTIMATORS


def own_loss(config: PPOConfig) -> bool:
    """Return True if the policy loss is the user's."""
    return config.actor_rollout_ref.actor.policy_loss.loss_mode not in names.POLICY_LOSSES
