#!/usr/bin/env bash
# Trains a small language model with GRPO to spell words backwards. Takes a few minutes on two CPU cores, without an
# accelerator. The rollout runs in MXFP8 (quantization=ascend), emulated with the layouts and rounding of an Ascend 950.
#
#   examples/quickstart/run.sh [key=value ...]        # any key of verl.trainer.main_ppo, e.g. trainer.n_gpus_per_node=2
#
# Later runs use the prepared model and data again. A run starts at step 0; with trainer.resume_mode=auto it continues
# from the last checkpoint. The records of the run before it are kept in the directory previous_1. At its end, a run
# writes a report: one HTML file for a browser.
set -euo pipefail
cd "$(dirname "$0")/../.."

prepared=outputs/quickstart
run="$prepared"
for argument in "$@"; do
    case "$argument" in trainer.default_local_dir=*) run="${argument#*=}" ;; esac
done

started=$SECONDS
python3 examples/quickstart/prepare.py --output "$prepared"

python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    data.train_files="$prepared/train.parquet" \
    data.val_files="$prepared/test.parquet" \
    data.train_batch_size=64 \
    data.max_prompt_length=8 \
    data.max_response_length=8 \
    reward.custom_reward_function.path=examples/quickstart/reward.py \
    reward.num_workers=1 \
    actor_rollout_ref.model.path="$prepared/model" \
    actor_rollout_ref.actor.ppo_mini_batch_size=16 \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 \
    actor_rollout_ref.actor.clip_ratio_low=0.2 \
    actor_rollout_ref.actor.clip_ratio_high=0.28 \
    actor_rollout_ref.actor.optim.lr=7e-4 \
    actor_rollout_ref.actor.optim.lr_scheduler_type=cosine \
    actor_rollout_ref.actor.optim.min_lr_ratio=0.1 \
    actor_rollout_ref.actor.optim.weight_decay=0 \
    actor_rollout_ref.actor.checkpoint.save_contents='[model,optimizer,extra,hf_model]' \
    actor_rollout_ref.actor.fsdp_config.dtype=float32 \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.dtype=float32 \
    actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.rollout.temperature=1.0 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
    actor_rollout_ref.rollout.quantization=ascend \
    actor_rollout_ref.rollout.enforce_eager=True \
    actor_rollout_ref.rollout.max_num_seqs=512 \
    actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=16 \
    actor_rollout_ref.rollout.val_kwargs.do_sample=True \
    actor_rollout_ref.rollout.val_kwargs.temperature=1.0 \
    actor_rollout_ref.rollout.val_kwargs.n=4 \
    trainer.device=auto \
    trainer.n_gpus_per_node=1 \
    trainer.nnodes=1 \
    trainer.project_name=quickstart \
    trainer.experiment_name=spell_backward \
    trainer.default_local_dir="$run" \
    trainer.logger='["console","file"]' \
    trainer.total_training_steps=50 \
    trainer.val_before_train=True \
    trainer.test_freq=25 \
    trainer.save_freq=25 \
    trainer.max_actor_ckpt_to_keep=2 \
    trainer.rollout_data_dir="$run/rollouts" \
    trainer.validation_data_dir="$run/validation" \
    trainer.timeline="$run/timeline.json" \
    trainer.resume_mode=disable \
    "$@"

report="$(python3 -m verl.cli report "$run")"
python3 examples/quickstart/summary.py "$run" --wall-seconds $((SECONDS - started)) --report "$report" \
    --next 'make quickstart ARGS="actor_rollout_ref.rollout.quantization=null trainer.default_local_dir=outputs/plain"' \
    --next 'make quickstart ARGS="trainer.n_gpus_per_node=2 trainer.default_local_dir=outputs/two_ranks"' \
    --next 'examples/grpo_trainer/run_smollm2_135m_cpu.sh        # a real pretrained model, a minute per step'
