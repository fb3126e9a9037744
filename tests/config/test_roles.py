import pytest

from verl.config import PPOConfig
from verl.config.roles import needs_critic, resolve_critic


@pytest.mark.parametrize(
    ("estimator", "enable", "needed"),
    [("gae", None, True), ("grpo", None, False), ("grpo", True, True), ("gae", False, False), ("rloo", None, False)],
)
def test_needs_critic_depends_on_the_estimator_unless_enable_is_set(estimator, enable, needed):
    config = PPOConfig()
    config.algorithm.adv_estimator, config.critic.enable = estimator, enable
    assert needs_critic(config) is needed


def test_resolve_critic_fills_null_values_from_the_actor():
    config = PPOConfig()
    actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    actor.ppo_mini_batch_size, actor.ppo_micro_batch_size_per_gpu, actor.use_dynamic_bsz = 32, 3, True
    actor.ppo_epochs, actor.loss_agg_mode, actor.strategy = 2, "token-sum", "fsdp2"
    model.path, model.trust_remote_code = "/policy", True
    critic = resolve_critic(config)
    assert (critic.ppo_mini_batch_size, critic.ppo_micro_batch_size_per_gpu, critic.use_dynamic_bsz) == (32, 3, True)
    assert (critic.ppo_epochs, critic.loss_agg_mode, critic.strategy) == (2, "token-sum", "fsdp2")
    assert (critic.forward_micro_batch_size_per_gpu, critic.forward_max_token_len_per_gpu) == (3, 32768)
    assert (critic.model.path, critic.model.tokenizer_path, critic.model.trust_remote_code) == (None, "/policy", True)
    assert (critic.optim.lr, critic.optim.clip_grad, critic.cliprange_value) == (1e-5, 1.0, 0.5)
    assert config.critic.ppo_epochs is None and config.critic.model.tokenizer_path is None, "the config was changed"


def test_resolve_critic_keeps_values_of_the_critic():
    config = PPOConfig()
    config.critic.ppo_mini_batch_size, config.critic.use_dynamic_bsz, config.critic.ppo_epochs = 64, False, 4
    config.critic.ppo_micro_batch_size_per_gpu, config.critic.ppo_max_token_len_per_gpu = 8, 100
    config.critic.model.trust_remote_code = False
    config.actor_rollout_ref.actor.use_dynamic_bsz = config.actor_rollout_ref.model.trust_remote_code = True
    critic = resolve_critic(config)
    assert (critic.ppo_mini_batch_size, critic.use_dynamic_bsz, critic.ppo_epochs) == (64, False, 4)
    assert (critic.forward_micro_batch_size_per_gpu, critic.forward_max_token_len_per_gpu) == (8, 100)
    assert critic.model.trust_remote_code is False
