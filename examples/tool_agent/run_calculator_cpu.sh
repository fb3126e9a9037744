#!/usr/bin/env bash
# Trains a small language model with GRPO to use a calculator. Takes minutes on two CPU cores, without an accelerator.
#
#   examples/tool_agent/run_calculator_cpu.sh [key=value ...]        # any key of verl.trainer.main_ppo
#
# Later runs use the prepared model and data again.
set -euo pipefail
cd "$(dirname "$0")/../.."

prepared=outputs/tool_agent
python3 examples/tool_agent/prepare.py --output "$prepared"

python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    data.train_files="$prepared/train.parquet" \
    data.val_files="$prepared/test.parquet" \
    data.train_batch_size=32 \
    data.max_prompt_length=32 \
    data.max_response_length=48 \
    reward.custom_reward_function.path=examples/tool_agent/reward.py \
    reward.num_workers=1 \
    actor_rollout_ref.model.path="$prepared/model" \
    actor_rollout_ref.actor.ppo_mini_batch_size=16 \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 \
    actor_rollout_ref.actor.optim.lr=3e-4 \
    actor_rollout_ref.actor.optim.weight_decay=0 \
    actor_rollout_ref.actor.fsdp_config.dtype=float32 \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.dtype=float32 \
    actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
    actor_rollout_ref.rollout.enforce_eager=True \
    actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=16 \
    actor_rollout_ref.rollout.val_kwargs.do_sample=True \
    actor_rollout_ref.rollout.val_kwargs.temperature=1.0 \
    actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent \
    actor_rollout_ref.rollout.multi_turn.enable=True \
    actor_rollout_ref.rollout.multi_turn.format=hermes \
    actor_rollout_ref.rollout.multi_turn.tool_config_path=examples/tool_agent/tool_config.yaml \
    actor_rollout_ref.rollout.multi_turn.max_assistant_turns=3 \
    trainer.n_gpus_per_node=1 \
    trainer.nnodes=1 \
    trainer.project_name=tool_agent \
    trainer.experiment_name=calculator \
    trainer.default_local_dir="$prepared" \
    trainer.logger='["console","file"]' \
    trainer.total_training_steps=20 \
    trainer.val_before_train=True \
    trainer.test_freq=10 \
    trainer.save_freq=-1 \
    trainer.resume_mode=disable \
    "$@"
