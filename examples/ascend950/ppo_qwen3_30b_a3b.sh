#!/usr/bin/env bash
# PPO on DAPO-Math-17k with Qwen3-30B-A3B, the rollout in MXFP8 on Ascend 950. env.sh has what depends on the
# machine, and says how to use several nodes, or GPUs.
# The critic is Qwen3-8B, which has the same tokens: one as large as the policy would not fit beside it.
#
#   examples/ascend950/ppo_qwen3_30b_a3b.sh [key=value ...]
set -euo pipefail
cd "$(dirname "$0")/../.."
source examples/ascend950/env.sh

python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=gae \
    algorithm.rollout_correction.rollout_is=token \
    data.train_files="$DATA/dapo/train.parquet" \
    data.val_files="$DATA/dapo/test.parquet" \
    data.train_batch_size=512 \
    data.max_prompt_length=2048 \
    data.max_response_length=8192 \
    data.filter_overlong_prompts=True \
    +data.apply_chat_template_kwargs.enable_thinking=False \
    actor_rollout_ref.model.path="$MODELS/Qwen3-30B-A3B" \
    actor_rollout_ref.actor.ppo_mini_batch_size=128 \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=1 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=2 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.35 \
    actor_rollout_ref.rollout.val_kwargs.do_sample=True \
    actor_rollout_ref.rollout.val_kwargs.temperature=1.0 \
    actor_rollout_ref.rollout.val_kwargs.n=16 \
    reward.reward_manager.name=dapo \
    +reward.reward_kwargs.max_resp_len=8192 \
    +reward.reward_kwargs.overlong_buffer_cfg.enable=True \
    +reward.reward_kwargs.overlong_buffer_cfg.len=2048 \
    +reward.reward_kwargs.overlong_buffer_cfg.penalty_factor=1.0 \
    critic.model.path="$MODELS/Qwen3-8B" \
    critic.optim.lr=1e-5 \
    critic.ppo_max_token_len_per_gpu=16384 \
    trainer.critic_warmup=5 \
    trainer.project_name=ascend950 \
    trainer.experiment_name=ppo_qwen3_30b_a3b \
    trainer.total_epochs=3 \
    trainer.test_freq=10 \
    trainer.save_freq=20 \
    trainer.max_actor_ckpt_to_keep=2 \
    "${MACHINE[@]}" \
    "$@"
