"""Keys of Megatron and VeOmni become keys of FSDP2, or an error if nothing corresponds to them."""

import pytest

from verl.config.engine_keys import translate

ACTOR, FSDP = "actor_rollout_ref.actor", "actor_rollout_ref.actor.fsdp_config"
MEGATRON = f"{ACTOR}.megatron"
OTHERS = ["data.train_batch_size=8", "algorithm.adv_estimator=grpo", "trainer.nnodes=2"]


def of_megatron(*words):
    return translate([*OTHERS, f"{ACTOR}.strategy=megatron", *words])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (f"{MEGATRON}.param_offload=True", f"{FSDP}.param_offload=True"),
        (f"+{MEGATRON}.optimizer_offload=False", f"{FSDP}.optimizer_offload=False"),
        (f"{MEGATRON}.context_parallel_size=4", f"{ACTOR}.ulysses_sequence_parallel_size=4"),
        (
            f"++{MEGATRON}.override_transformer_config.context_parallel_size=4",
            f"{ACTOR}.ulysses_sequence_parallel_size=4",
        ),
        ("critic.megatron.param_offload=True", "critic.fsdp.param_offload=True"),
        (
            "actor_rollout_ref.ref.megatron.context_parallel_size=2",
            "actor_rollout_ref.ref.ulysses_sequence_parallel_size=2",
        ),
        (f"{MEGATRON}.dtype=bfloat16", f"{FSDP}.dtype=bfloat16"),
        (
            f"+{MEGATRON}.override_transformer_config.recompute_granularity=full",
            "actor_rollout_ref.model.enable_gradient_checkpointing=True",
        ),
        (f"{ACTOR}.optim.lr_decay_style=cosine", f"{ACTOR}.optim.lr_scheduler_type=cosine"),
        (
            f"+{ACTOR}.optim.override_optimizer_config.optimizer_cpu_offload=True",
            f"{FSDP}.optimizer_offload=True",
        ),
        (f"{ACTOR}.veomni.ulysses_parallel_size=2", f"{ACTOR}.ulysses_sequence_parallel_size=2"),
        (f"{ACTOR}.veomni.enable_fsdp_offload=True", f"{FSDP}.offload_policy=True"),
        (f"{ACTOR}.veomni.fsdp_size=8", f"{FSDP}.fsdp_size=8"),
    ],
)
def test_a_key_becomes_one_of_fsdp2(old, new):
    result = of_megatron(old)
    assert result.overrides == [*OTHERS, f"{ACTOR}.strategy=fsdp2", new]
    assert (old, new) in result.renamed and not result.refused


@pytest.mark.parametrize(
    ("old", "reason"),
    [
        (f"{MEGATRON}.tensor_model_parallel_size=4", "divides every weight"),
        (f"{MEGATRON}.expert_tensor_parallel_size=1", "divides every weight"),
        (f"{MEGATRON}.pipeline_model_parallel_size=2", "a part of every layer"),
        (f"+{MEGATRON}.override_transformer_config.num_layers_in_last_pipeline_stage=3", "a part of every layer"),
        (f"{MEGATRON}.use_mbridge=True", "Hugging Face format"),
        (f"{MEGATRON}.dist_checkpointing_path=/models/mcore", "Hugging Face format"),
        (f"{MEGATRON}.grad_offload=True", "only during an update"),
        (f"+{MEGATRON}.override_transformer_config.moe_permute_fusion=True", "kernels"),
        (f"+{MEGATRON}.override_transformer_config.moe_aux_loss_coeff=0.0", "off"),
        (f"{MEGATRON}.router_replay.mode=disabled", "off"),
        ("actor_rollout_ref.model.mtp.enable=False", "off"),
        ("model_engine=megatron", "default"),
        ("--config-name=ppo_megatron_trainer.yaml", "default"),
        (f"{ACTOR}.optim.override_optimizer_config.use_precision_aware_optimizer=True", "optimizer"),
    ],
)
def test_a_key_without_effect_on_the_result_is_dropped(old, reason):
    result = of_megatron(old)
    assert result.overrides == [*OTHERS, f"{ACTOR}.strategy=fsdp2"]
    assert any(reason in why and old in keys for why, keys in result.dropped.items()) and not result.refused


@pytest.mark.parametrize(
    "old",
    [
        "actor_rollout_ref.model.mtp.enable_train=True",
        f"+{MEGATRON}.override_transformer_config.moe_aux_loss_coeff=0.001",
        f"{MEGATRON}.router_replay.mode=R3",
        f"+{MEGATRON}.override_transformer_config.fp8=e4m3",
        f"{ACTOR}.optim.lr_decay_style=WSD",
        f"{ACTOR}.optim.min_lr=1e-7",
        f"{MEGATRON}.a_new_key=3",
    ],
)
def test_a_key_that_changes_the_training_is_refused(old):
    [problem] = of_megatron(old).refused
    assert problem.startswith(f"{old}: ")


def test_recomputation_is_switched_on_once():
    recompute = f"+{MEGATRON}.override_transformer_config.recompute"
    result = of_megatron(f"{recompute}_granularity=full", f"{recompute}_method=uniform", f"{recompute}_num_layers=1")
    assert [word for word in result.overrides if "checkpointing" in word] == [
        "actor_rollout_ref.model.enable_gradient_checkpointing=True"
    ]


def test_commands_for_fsdp_stay_as_they_are():
    words = [*OTHERS, f"{ACTOR}.strategy=fsdp", "actor_rollout_ref.model.path=/models/megatron/x", "--config-path=conf"]
    result = translate(words)
    assert result.overrides == words and not result.needed
