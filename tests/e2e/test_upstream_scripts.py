"""Training commands of upstream verl, with a tiny model and tiny sizes in place of theirs, train for two steps."""

import math

import pytest

from fixtures.accepted_scripts import ROWS
from fixtures.training import TinyRun

pytestmark = pytest.mark.e2e

BY_SCRIPT = {row["script"]: row for row in ROWS}
ROLES = ("actor_rollout_ref.actor", "actor_rollout_ref.ref", "critic")
# Metrics that upstream's users plot.
COMMON = {
    *("actor/pg_loss", "actor/grad_norm", "actor/lr", "actor/pg_clipfrac", "actor/ppo_kl", "actor/entropy"),
    *(f"critic/{what}/{which}" for what in ("score", "rewards", "advantages") for which in ("mean", "max", "min")),
    *("prompt_length/mean", "response_length/mean", "response_length/clip_ratio", "perf/throughput"),
    *("timing_s/step", "timing_s/gen", "timing_s/update_actor", "timing_s/update_weights", "training/global_step"),
}
CRITIC = {"critic/vf_loss", "critic/grad_norm", "critic/vf_explained_var", "critic/values/mean"}


def of_roles(suffix, value):
    return {f"{role}.{suffix}": value for role in ROLES}


# Sizes of machines, models and data. They replace keys that a command sets, and are not added to it.
SIZES = {
    **of_roles("ulysses_sequence_parallel_size", 1),
    **of_roles("fsdp_config.ulysses_sequence_parallel_size", 1),
    **of_roles("fsdp_config.fsdp_size", -1),
    **of_roles("fsdp_config.mixed_precision.param_dtype", "fp32"),
    **of_roles("ppo_mini_batch_size", 4),
    **of_roles("ppo_micro_batch_size_per_gpu", 2),
    **of_roles("ppo_max_token_len_per_gpu", 64),
    "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu": 64,
    "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu": 64,
    "actor_rollout_ref.rollout.max_num_batched_tokens": 256,
    "actor_rollout_ref.rollout.max_model_len": 32,
    "actor_rollout_ref.rollout.n": 2,
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
    "actor_rollout_ref.model.override_config.max_position_embeddings": None,
    "actor_rollout_ref.model.lora_rank": 4,
    "critic.model.path": None,
    "reward.reward_kwargs.overlong_buffer_cfg.len": 4,
    "reward.reward_kwargs.max_resp_len": 8,
    "data.train_batch_size": 4,
    "rollout.n_gpus_per_node": 1,
    "rollout.total_rollout_steps": 512,
    "trainer.n_gpus_per_node": 1,
    "trainer.nnodes": 1,
    "trainer.resume_from_path": None,
}
# Added to each command: where it runs, and for how long.
PLACE = {
    "data.max_prompt_length": 16,
    "data.max_response_length": 8,
    "actor_rollout_ref.rollout.dtype": "float32",
    "actor_rollout_ref.rollout.enforce_eager": True,
    "actor_rollout_ref.actor.fsdp_config.dtype": "float32",
    "reward.num_workers": 1,
    "trainer.device": "cpu",
    "trainer.logger": "[console,file]",
    "trainer.total_training_steps": 2,
    "trainer.save_freq": -1,
    "trainer.test_freq": 2,
    "trainer.val_before_train": False,
}


def shrink(words, run):
    """Return the arguments with the sizes of a tiny run; `None` in `SIZES` leaves a key out."""
    place = PLACE | {
        "actor_rollout_ref.model.path": run.model,
        "data.train_files": run.train,
        "data.val_files": run.val,
        "reward.custom_reward_function.path": run.reward,
        "trainer.default_local_dir": run.out,
    }
    kept = []
    for word in words:
        key, _, value = word.lstrip("+").partition("=")
        if key in place:
            continue
        if key not in SIZES or value in ("0", "False"):
            kept.append(word)
        elif SIZES[key] is not None:
            kept.append(f"{word.partition('=')[0]}={SIZES[key]}")
    if "actor_rollout_ref.hybrid_engine=False" in words:
        place["actor_rollout_ref.rollout.checkpoint_engine.backend"] = "gloo"
    if any(word.startswith("critic.model.path=") for word in words):
        place["critic.model.path"] = run.model
    return [*kept, *(f"{key}={value}" for key, value in place.items())]


@pytest.mark.parametrize(
    "script",
    [
        "examples/ascend_extras/grpo_trainer/run_qwen3_32b_fsdp.sh",
        "examples/ascend_extras/ppo_trainer/run_qwen3_8b_fsdp.sh",
        "examples/cispo_trainer/run_qwen3_8b_fsdp.sh",
        "examples/otb_trainer/run_qwen3_8b_fsdp.sh",
        "examples/remax_trainer/run_qwen2.5_math_7b_sync_fsdp.sh",
        "examples/tuning/lora/run_qwen3_8b_merge_fsdp.sh",
        "tests/special_npu/nightly_ci_ascend/run_gspo_qwen3_8b_fsdp2_npu.sh",
        "tests/special_npu/quick_start/run_qwen3_0_6b_fsdp2_vllm_ascend.sh",
        "verl/experimental/fully_async_policy/shell/dapo_7b_math_fsdp2_4_4.sh",
        "verl/experimental/one_step_off_policy/shell/grpo_qwen3_8b_gsm8k_fsdp2_8_8_npu.sh",
    ],
)
def test_two_steps_with_upstreams_metrics(tmp_path, script):
    row = BY_SCRIPT[script]
    run = TinyRun(tmp_path, module=row["module"])
    run.run(*shrink(row["words"], run))
    metrics = run.metrics()
    assert sorted(metrics) == [1, 2]
    expected = COMMON | (CRITIC if "algorithm.adv_estimator=gae" in row["words"] else set())
    for step in (1, 2):
        assert expected <= metrics[step].keys(), expected - metrics[step].keys()
        assert all(math.isfinite(metrics[step][name]) for name in expected)
