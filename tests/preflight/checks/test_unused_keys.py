"""Notes about changed keys that have no effect."""

import itertools
from dataclasses import replace

import pytest

from verl.config import OptimConfig, PPOConfig
from verl.config.run_facts import RunFacts
from verl.config.schema import key_of
from verl.workers.engine.optim import make_schedule

A = "actor_rollout_ref__actor__"
R = "actor_rollout_ref__rollout__"
NO_VALIDATION = {"trainer__val_before_train": False}
TOOL_AGENT = {R + "agent__default_agent_loop": "tool_agent", R + "multi_turn__enable": True}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"algorithm__gamma": 0.9}, "algorithm.gamma"),
        ({"algorithm__gdpo_reward_weights": "[1.0]"}, "algorithm.gdpo_reward_weights"),
        ({"algorithm__gdpo_reward_keys": "[acc]"}, "algorithm.gdpo_reward_keys"),
        ({A + "use_dynamic_bsz": True}, "actor.ppo_micro_batch_size_per_gpu"),
        ({A + "ppo_max_token_len_per_gpu": 99}, "actor.ppo_max_token_len_per_gpu"),
        ({A + "kl_loss_coef": 0.1}, "actor.kl_loss_coef"),
        ({"actor_rollout_ref__ref__log_prob_micro_batch_size_per_gpu": 3}, "ref.log_prob_micro_batch_size_per_gpu"),
        ({A + "loss_scale_factor": 3}, "actor.loss_scale_factor"),
        ({A + "clip_ratio": 0.3}, "actor.clip_ratio"),
        ({A + "tau_neg": 2.0}, "actor.tau_neg"),
        ({A + "policy_loss__dro_beta": 0.1}, "policy_loss.dro_beta"),
        ({A + "policy_loss__loss_mode": "kl_cov", A + "clip_ratio": 0.3}, "actor.clip_ratio"),
        ({A + "policy_loss__loss_mode": "gspo", A + "clip_ratio_c": 4}, "actor.clip_ratio_c"),
        ({A + "policy_loss__loss_mode": "geo_mean", A + "loss_agg_mode": "token-sum"}, "actor.loss_agg_mode"),
        (
            {
                A + "policy_loss__loss_mode": "sapo",
                A + "loss_agg_mode": "seq-mean-token-mean",
                A + "use_kl_loss": True,
                A + "loss_scale_factor": 3,
            },
            "actor.loss_scale_factor",
        ),
        ({A + "optim__min_lr_ratio": 0.3}, "optim.min_lr_ratio"),
        ({R + "val_kwargs__temperature": 0.5}, "val_kwargs.temperature"),
        ({R + "n_gpus_per_node": 2}, "rollout.n_gpus_per_node"),
        ({R + "checkpoint_engine__backend": "gloo"}, "checkpoint_engine.backend"),
        ({R + "nnodes": 1, R + "checkpoint_engine__timeout": 9}, "checkpoint_engine.timeout"),
        ({R + "server__port": 2000}, "server.port"),
        ({R + "log_prob_max_token_len_per_gpu": 99}, "rollout.log_prob_max_token_len_per_gpu"),
        ({"trainer__total_training_steps": 3, "trainer__total_epochs": 2}, "trainer.total_epochs"),
        ({"trainer__resume_from_path": "/x"}, "trainer.resume_from_path"),
        ({"data__shuffle": False, "data__seed": 3}, "data.seed"),
        ({"data__shuffle": False, "data__seed": 3, "data__train_max_samples": 8}, "data.seed"),
        ({"data__filter_overlong_prompts": True, "data__truncation": "left"}, "data.truncation"),
        ({"data__gen_batch_size": 8}, "data.gen_batch_size"),
        ({"data__custom_cls__name": "Mine"}, "data.custom_cls.name"),
        ({"data__val_batch_size": 2, **NO_VALIDATION}, "data.val_batch_size"),
        ({"data__val_max_samples": 2, **NO_VALIDATION}, "data.val_max_samples"),
        ({R + "val_kwargs__n": 2, **NO_VALIDATION}, "val_kwargs.n"),
        ({"trainer__log_val_generations": 2, **NO_VALIDATION}, "trainer.log_val_generations"),
        ({A + "optim__total_training_steps": 9}, "optim.total_training_steps"),
        ({A + "optim__lr_warmup_steps": 0, A + "optim__lr_warmup_steps_ratio": 0.1}, "optim.lr_warmup_steps_ratio"),
    ],
)
def test_changed_key_without_effect_is_noted(plan_of, changes, key):
    notes = [note for note in plan_of(**changes).notes if "on a CPU" not in note]
    assert len(notes) == 1 and notes[0].endswith(key)


@pytest.mark.parametrize(
    "changes",
    [
        {A + "use_dynamic_bsz": True, A + "ppo_max_token_len_per_gpu": 99, A + "ppo_micro_batch_size_per_gpu": None},
        {A + "use_kl_loss": True, A + "kl_loss_coef": 0.1},
        {A + "clip_ratio": 0.3, A + "clip_ratio_low": "null"},
        {A + "policy_loss__loss_mode": "sapo", A + "tau_pos": 2.0},
        {A + "policy_loss__loss_mode": "gspo", A + "loss_agg_mode": "token-sum", A + "entropy_coeff": 0.1},
        {R + "val_kwargs__do_sample": True, R + "val_kwargs__temperature": 0.5},
        {"trainer__total_epochs": 2},
        {"data__seed": 3, "data__train_max_samples": 8},
        {"data__filter_overlong_prompts": True, "data__truncation": "left", **TOOL_AGENT},
        {"data__val_batch_size": 2, "trainer__test_freq": 1, **NO_VALIDATION},
        {"data__val_batch_size": 2, "trainer__val_only": True, **NO_VALIDATION},
    ],
)
def test_changed_key_with_effect_is_not_noted(plan_of, changes):
    assert [note for note in plan_of(**changes).notes if "on a CPU" not in note] == []


OPTIM = dict(lr_warmup_steps_ratio=0.25, total_training_steps=8, min_lr_ratio=0.3)
OPTIM_VALUES = itertools.product((-1, None, 0, 3), (0.0, 0.25), ("constant", "cosine"), (0.0, 0.3), (-1, 8))


@pytest.mark.parametrize(("warmup", "ratio", "kind", "least", "total"), OPTIM_VALUES)
def test_keys_of_the_schedule_are_noted_if_the_learning_rate_does_not_depend_on_them(warmup, ratio, kind, least, total):
    config = OptimConfig(
        lr=1.0,
        lr_warmup_steps=warmup,
        lr_warmup_steps_ratio=ratio,
        lr_scheduler_type=kind,
        min_lr_ratio=least,
        total_training_steps=total,
    )
    run, optim = PPOConfig(), "actor_rollout_ref.actor.optim"
    run.actor_rollout_ref.actor.optim = config
    facts = RunFacts(run, "cpu", rows_choose_loop=False)
    for name, value in OPTIM.items():
        (condition,) = key_of(OptimConfig.__dataclass_fields__[name]).only_with
        rates = [make_schedule(replace(config, **{name: one}), 20) for one in (value, getattr(OptimConfig(), name))]
        changes = [rates[0](step) != rates[1](step) for step in range(30)]
        assert any(changes) == (condition.why_not(facts, f"{optim}.{name}") is None), name


def test_offload_of_the_reference_model_without_one(plan_of):
    offload = {"actor_rollout_ref__ref__fsdp_config__param_offload": True}
    (note,) = [note for note in plan_of(**offload).notes if "on a CPU" not in note]
    assert note.startswith("no effect without a reference model") and note.endswith("ref.fsdp_config.param_offload")


def test_offload_on_a_cpu(plan_of):
    keys = {A + "fsdp_config__param_offload": True, A + "fsdp_config__optimizer_offload": True}
    keys |= {"actor_rollout_ref__ref__fsdp_config__param_offload": True, A + "use_kl_loss": True}
    notes = [note for note in plan_of(**keys).notes if "offload" in note]
    assert notes == [
        "no effect on a CPU, which only has host memory: actor_rollout_ref.actor.fsdp_config.optimizer_offload, "
        "actor_rollout_ref.actor.fsdp_config.param_offload, actor_rollout_ref.ref.fsdp_config.param_offload"
    ]


def test_an_optimizer_of_the_reference_model(plan_of):
    keys = {"actor_rollout_ref__ref__fsdp_config__optimizer_offload": True, A + "use_kl_loss": True}
    assert (
        "no effect because the reference model has no optimizer: actor_rollout_ref.ref.fsdp_config.optimizer_offload"
        in plan_of(**keys).notes
    )


def test_device_memory_keys_are_noted_on_a_cpu(plan_of):
    assert any("rollout.gpu_memory_utilization" in note for note in plan_of().notes)


def conditions(section, prefix=""):
    """All conditions below a section, with the dotted names of their keys."""
    for field in section.__dataclass_fields__.values():
        name, key, value = prefix + field.name, key_of(field), getattr(section, field.name)
        yield from ((name, condition) for condition in key.only_with)
        yield from ((f"{name}.{entry}", condition) for entry, condition in key.entries_only_with.items())
        if hasattr(value, "__dataclass_fields__"):
            yield from conditions(value, f"{name}.")


@pytest.mark.parametrize("device", ["cpu", "cuda", "npu"])
def test_conditions_only_name_existing_keys_and_facts(device):
    found = list(conditions(PPOConfig()))
    assert len(found) > 70
    for name, condition in found:
        reason = condition.why_not(RunFacts(PPOConfig(), device, rows_choose_loop=False), name)
        assert reason is None or reason.startswith(("with ", "without ", "because ", "on a CPU", "in bypass mode"))
