#!/usr/bin/env bash
# GRPO on GSM8K with Qwen3-0.6B, the rollout in MXFP8 on Ascend 950. env.sh has what depends on the
# machine, and says how to use several nodes, or GPUs.
#
#   examples/ascend950/grpo_qwen3_0.6b.sh [key=value ...]
set -euo pipefail
cd "$(dirname "$0")/../.."
source examples/ascend950/env.sh

python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    algorithm.rollout_correction.rollout_is=token \
    data.train_files="$DATA/gsm8k/train.parquet" \
    data.val_files="$DATA/gsm8k/test.parquet" \
    data.train_batch_size=256 \
    data.max_prompt_length=512 \
    data.max_response_length=1024 \
    data.filter_overlong_prompts=True \
    +data.apply_chat_template_kwargs.enable_thinking=False \
    actor_rollout_ref.model.path="$MODELS/Qwen3-0.6B" \
    actor_rollout_ref.actor.ppo_mini_batch_size=64 \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 \
    actor_rollout_ref.actor.clip_ratio_high=0.28 \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.5 \
    trainer.project_name=ascend950 \
    trainer.experiment_name=grpo_qwen3_0.6b \
    trainer.total_epochs=15 \
    trainer.test_freq=10 \
    trainer.save_freq=20 \
    trainer.max_actor_ckpt_to_keep=2 \
    "${MACHINE[@]}" \
    "$@"
