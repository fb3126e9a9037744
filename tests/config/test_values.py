"""`value_problems`: single values that are unknown, out of bounds or not supported."""

import pytest

from verl.config import load_config
from verl.config.values import value_problems


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("algorithm.adv_estimator", "grop", ("unknown", "did you mean grpo?")),
        ("algorithm.rollout_correction.rollout_is", "tokens", ("unknown", "did you mean token?")),
        ("algorithm.rollout_correction.debug_rollout_actor_probs", "True", ("not supported", "False")),
        ("critic.model.lora_rank", "8", ("not supported", "the whole critic is trained")),
        ("critic.shuffle", "True", ("not supported", "use False")),
        ("critic.megatron.tensor_model_parallel_size", "2", ("not supported", "fsdp2")),
        ("critic.cliprange_value", "0", ("above 0",)),
        ("critic.loss_agg_mode", "token_mean", ("unknown", "did you mean token-mean?")),
        ("model_engine", "megatron", ("not supported", "dp")),
        ("actor_rollout_ref.actor.optim.betas", "[0.9]", ("1 values; give 2", "two moments")),
        ("actor_rollout_ref.actor.optim.betas", "[0.9,0.99,0.999]", ("3 values; give 2",)),
        ("actor_rollout_ref.actor.optim.betas", "[0.9,1.0]", ("below 1",)),
        ("critic.optim.betas", "[-0.1,0.9]", ("at least 0",)),
        ("actor_rollout_ref.actor.strategy", "megatron", ("not supported", "fsdp2")),
        ("actor_rollout_ref.actor.megatron.tensor_model_parallel_size", "2", ("not supported", "fsdp2")),
        ("actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size", "0", ("at least 1 ranks",)),
        ("actor_rollout_ref.actor.policy_loss.loss_mode", "gsop", ("unknown", "did you mean gspo?")),
        ("actor_rollout_ref.actor.policy_loss.clip_cov_ratio", "0", ("above 0",)),
        ("actor_rollout_ref.actor.tau_neg", "0", ("above 0",)),
        ("actor_rollout_ref.actor.loss_agg_mode", "token_mean", ("unknown", "did you mean token-mean?")),
        ("actor_rollout_ref.actor.kl_loss_type", "full", ("not supported", "low_var_kl")),
        ("actor_rollout_ref.actor.checkpoint.save_contents", "[model,weights]", ("weights is unknown", "hf_model")),
        ("actor_rollout_ref.actor.clip_ratio_c", "1", ("above 1",)),
        ("actor_rollout_ref.model.lora_rank", "-1", ("at least 0",)),
        ("actor_rollout_ref.rollout.name", "sglang", ("not supported", "vllm")),
        ("actor_rollout_ref.rollout.mode", "sync", ("not supported", "async")),
        ("actor_rollout_ref.rollout.quantization", "mxfp8", ("unknown", "fp8, torchao, ascend, null")),
        ("actor_rollout_ref.rollout.quantization", "Ascend", ("unknown", "did you mean ascend?")),
        ("actor_rollout_ref.rollout.quantization", "int4", ("unknown", "fp8, torchao, ascend, null")),
        ("actor_rollout_ref.rollout.quantization_side", "sendr", ("unknown", "did you mean sender?")),
        ("actor_rollout_ref.nccl_timeout", "0", ("at least 1 seconds",)),
        ("actor_rollout_ref.rollout.enable_sleep_mode", "False", ("not supported", "use free_cache_engine")),
        ("trainer.max_critic_ckpt_to_keep", "2", ("not supported", "use max_actor_ckpt_to_keep")),
        ("actor_rollout_ref.rollout.checkpoint_engine.backend", "nixl", ("not supported", "gloo")),
        ("actor_rollout_ref.rollout.checkpoint_engine.timeout", "0", ("above 0 seconds",)),
        ("actor_rollout_ref.rollout.multi_turn.format", "gpt-oss", ("not supported", "use hermes")),
        ("actor_rollout_ref.rollout.multi_turn.format", "hremes", ("unknown", "did you mean hermes?")),
        ("actor_rollout_ref.rollout.multi_turn.interaction_config_path", "/i", ("not supported", "agent loop")),
        ("actor_rollout_ref.rollout.multi_turn.max_assistant_turns", "0", ("at least 1",)),
        ("actor_rollout_ref.rollout.multi_turn.max_tool_response_length", "0", ("at least 1 characters",)),
        ("actor_rollout_ref.rollout.multi_turn.tool_response_truncate_side", "end", ("unknown", "left, right, middle")),
        ("actor_rollout_ref.rollout.data_parallel_size", "2", ("use 1", "set expert_parallel_size to")),
        ("actor_rollout_ref.rollout.enable_rollout_routing_replay", "True", ("not supported", "False")),
        ("actor_rollout_ref.rollout.engine_kwargs", "{sglang: {x: 1}}", ("not supported", "vllm")),
        ("actor_rollout_ref.rollout.engine_kwargs", "{vlm: {x: 1}}", ("unknown key", "vllm")),
        ("actor_rollout_ref.rollout.dtype", "float16", ("not supported", "float32")),
        ("actor_rollout_ref.rollout.temperature", "0", ("at least 0.01",)),
        ("actor_rollout_ref.rollout.n", "0", ("at least 1", "samples")),
        ("data.truncation", "rigth", ("unknown", "did you mean right?")),
        ("data.train_batch_size", "0", ("at least 1 prompts",)),
        ("reward.reward_manager.name", "prime", ("not supported", "naive")),
        ("reward.reward_manager.name", "dappo", ("unknown", "did you mean dapo?")),
        ("reward.timeout", "0", ("above 0 seconds",)),
        ("trainer.logger", "[console,mlflow]", ("mlflow", "not supported", "tensorboard")),
        ("trainer.logger", "[consle]", ("unknown", "did you mean console?")),
        ("trainer.v1.trainer_mode", "async", ("unknown", "separate_async")),
        ("trainer.nnodes", "0", ("at least 1",)),
        ("trainer.critic_warmup", "-1", ("at least 0",)),
        ("trainer.device", "tpu", ("unknown", "cpu")),
        ("trainer.resume_mode", "never", ("unknown", "disable")),
    ],
)
def test_invalid_value_is_reported_with_a_replacement(problems_of, key, value, words):
    # All roles are used, because unsupported values are ignored in unused roles.
    roles = {"critic__enable": True, "actor_rollout_ref__actor__use_kl_loss": True}
    changes = roles | {key.replace(".", "__"): value}
    found = [problem for problem in problems_of(**changes) if problem.removeprefix("unknown key '").startswith(key)]
    assert len(found) == 1
    assert all(word in found[0] for word in words), found[0]


def test_values_that_turn_unsupported_features_off_are_accepted(plan_of):
    """Does not raise."""
    plan_of(
        actor_rollout_ref__actor__fsdp_config__param_offload="False",
        actor_rollout_ref__model__lora_rank=0,
        critic__optim__lr=1e-5,
        actor_rollout_ref__actor__megatron__override_transformer_config="{}",
        actor_rollout_ref__rollout__quantization="null",
        actor_rollout_ref__rollout__enable_rollout_routing_replay="False",
        trainer__use_v1="False",
    )


@pytest.mark.parametrize("key", ["actor_rollout_ref.model.path", "data.train_files", "data.val_files"])
def test_required_value_is_not_set(problem_of, key):
    assert problem_of(**{key.replace(".", "__"): "null"}).startswith(f"{key} is not set")


def test_registered_estimator_of_the_user_is_accepted(run_files):
    from verl.config import load_config
    from verl.trainer.ppo.core_algos import register_adv_est

    @register_adv_est("mine_for_this_test")
    def mine(**columns):
        raise NotImplementedError

    config = load_config(run_files.overrides(algorithm__adv_estimator="mine_for_this_test"))
    assert value_problems(config) == {}


def refused(*overrides):
    """Keys that `value_problems` reports."""
    return set(value_problems(load_config(["actor_rollout_ref.model.path=m", *overrides])))


def test_values_that_mean_what_is_done_anyway_are_accepted():
    asleep = "actor_rollout_ref.rollout.enable_sleep_mode"
    assert refused(f"{asleep}=False", "actor_rollout_ref.rollout.nnodes=1") == set()
    assert refused(f"{asleep}=False") == {asleep}
    kept = "trainer.max_critic_ckpt_to_keep"
    assert refused("critic.enable=True", f"{kept}=2", "trainer.max_actor_ckpt_to_keep=2") == set()
    assert refused("critic.enable=True", f"{kept}=2", "trainer.max_actor_ckpt_to_keep=3") == {kept}
    assert refused("critic.enable=False", f"{kept}=2") == set()
    scale = "actor_rollout_ref.model.lora_alpha"
    assert refused(f"{scale}=0") == set()
    assert refused(f"{scale}=0", "actor_rollout_ref.model.lora_rank=8") == {scale}


def test_an_unsupported_value_without_effect_is_accepted():
    qat = "actor_rollout_ref.actor.fsdp_config.qat"
    assert refused(f"{qat}.mode=w4a16", f"{qat}.enable=False") == set()
    assert refused(f"{qat}.mode=w4a16", f"{qat}.enable=True") == {f"{qat}.mode"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("actor_rollout_ref.actor.use_torch_compile", True),
        ("actor_rollout_ref.model.use_shm", True),
        ("actor_rollout_ref.model.lora.merge", False),
        ("data.dataloader_num_workers", 8),
    ],
)
def test_keys_that_change_no_result_are_noted(plan_of, key, value):
    notes = plan_of(**{key.replace(".", "__"): value}).notes
    assert any(note.startswith("no effect because ") and key in note for note in notes), notes
    assert not any(key in note for note in plan_of().notes)
