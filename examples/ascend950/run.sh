#!/usr/bin/env bash
# GRPO or PPO with an MXFP8 rollout on Ascend 950, or on GPUs. This file is complete: copy it and change it.
#
#   MODEL=Qwen3-8B ALGORITHM=grpo examples/ascend950/run.sh [key=value ...]
#
# Variables, with their defaults:
#
#   MODEL=Qwen3-8B       Qwen3-0.6B, Qwen2.5-7B-Instruct, Qwen3-8B (GSM8K); Qwen3-30B-A3B, Qwen3-32B (DAPO-Math-17k)
#   ALGORITHM=grpo       grpo or ppo
#   PLATFORM=npu         npu: Ascend 950; cuda: GPUs
#   QUANTIZATION=ascend  of the rollout. npu: ascend (MXFP8) or null; cuda: fp8 (its default) or null
#   NODES=1              nodes of the trainer; replicas share its devices
#   ROLLOUT_NODES=0      separate nodes for the replicas, which then generate the next batch during training
#   DEVICES=8            devices per node
#   MODELS=~/models      directory of the models:  hf download Qwen/Qwen3-8B --local-dir ~/models/Qwen3-8B
#   DATA=~/data          output directory of examples/data_preprocess
#
# With several nodes, MODELS must have the same content on each of them, and checkpoints need a shared file system
# (docs/several_nodes.md). Ray's processes inherit the environment of `ray start`, so source this file first; sourcing
# sets the environment and starts nothing:
#
#   source examples/ascend950/run.sh && ray start --head --port=6379                   # the node that starts the run
#   source examples/ascend950/run.sh && ray start --address=IP_OF_THE_FIRST:6379       # the others
if [ "${BASH_SOURCE[0]}" = "$0" ]; then set -euo pipefail; fi
: "${PLATFORM:=npu}" "${NODES:=1}" "${ROLLOUT_NODES:=0}" "${DEVICES:=8}" "${MODELS:=$HOME/models}" "${DATA:=$HOME/data}"
: "${MODEL:=Qwen3-8B}" "${ALGORITHM:=grpo}"

# ---- environment ----

# Removes expandable segments from the allocator variable named $1 and keeps its other settings.
without_expandable_segments() {
    local IFS=, setting kept=()
    for setting in ${!1:-}; do [[ ${setting,,} == *expandable_segments*true* ]] || kept+=("$setting"); done
    if [ "${#kept[@]}" = 0 ]; then unset "$1"; else export "$1=${kept[*]}"; fi
}

case "$PLATFORM" in
npu)
    : "${QUANTIZATION:=ascend}"
    collective=hccl
    # CANN's own variables, if the login shell has not set them.
    if [ -z "${ASCEND_HOME_PATH:-}" ]; then
        strict="$-"
        set +eu  # CANN's files fail under these options
        for file in /usr/local/Ascend/ascend-toolkit/set_env.sh /usr/local/Ascend/nnal/atb/set_env.sh; do
            if [ -f "$file" ]; then source "$file"; fi
        done
        [[ $strict != *e* ]] || set -e
        [[ $strict != *u* ]] || set -u
    fi
    # Weights in NZ format cannot be replaced, and waking the engine would raise.
    export VLLM_ASCEND_ENABLE_NZ=0
    # Expandable segments exclude the memory pool of a sleeping engine.
    without_expandable_segments PYTORCH_NPU_ALLOC_CONF
    # If unset, vLLM loads all plugins. A list would need both vllm-ascend's and verl's.
    unset VLLM_PLUGINS
    # Seconds that ranks wait for each other. A rank that reads large weights from a slow disk is late.
    export HCCL_CONNECT_TIMEOUT="${HCCL_CONNECT_TIMEOUT:-1200}"
    # Trainer, engine and weight update are separate processes on one NPU. By default HCCL uses one port for all of them.
    export HCCL_HOST_SOCKET_PORT_RANGE="${HCCL_HOST_SOCKET_PORT_RANGE:-auto}"
    export HCCL_NPU_SOCKET_PORT_RANGE="${HCCL_NPU_SOCKET_PORT_RANGE:-auto}"
    # Operator queue of the rollout only: 1 queues on the host, 2 in two stages, 0 disables it. vllm-ascend's default:
    # export VLLM_ASCEND_TASK_QUEUE_ENABLE=1
    ;;
cuda)
    : "${QUANTIZATION:=fp8}"
    collective=nccl
    # For the same reasons as on an NPU.
    without_expandable_segments PYTORCH_CUDA_ALLOC_CONF
    unset VLLM_PLUGINS
    ;;
*)
    echo "run.sh: PLATFORM=$PLATFORM: use npu or cuda" >&2
    return 2 2>/dev/null || exit 2
    ;;
esac

if [ "${BASH_SOURCE[0]}" != "$0" ]; then return; fi

# ---- keys that depend on the machine ----

MACHINE=(
    trainer.device="$PLATFORM"
    trainer.nnodes="$NODES"
    trainer.n_gpus_per_node="$DEVICES"
    actor_rollout_ref.rollout.quantization="$QUANTIZATION"
)
if [ "$((NODES + ROLLOUT_NODES))" != 1 ]; then
    MACHINE+=(ray_kwargs.ray_init.address=auto)
fi
if [ "$ROLLOUT_NODES" != 0 ]; then
    MACHINE+=(
        actor_rollout_ref.rollout.nnodes="$ROLLOUT_NODES"
        actor_rollout_ref.rollout.n_gpus_per_node="$DEVICES"
        actor_rollout_ref.rollout.checkpoint_engine.backend="$collective"
        # The engine does not share these devices with the trainer.
        actor_rollout_ref.rollout.gpu_memory_utilization=0.85
        trainer.rollout_lag=1
    )
fi

# ---- keys that depend on the model ----

CRITIC=$MODEL
case "$MODEL" in
Qwen3-0.6B | Qwen2.5-7B-Instruct | Qwen3-8B) SIZE=small TENSOR_PARALLEL=1 ;;
# A critic as large as these policies does not fit beside them. Qwen3-8B has the same tokenizer.
Qwen3-30B-A3B) SIZE=large TENSOR_PARALLEL=2 CRITIC=Qwen3-8B ;;
Qwen3-32B) SIZE=large TENSOR_PARALLEL=4 CRITIC=Qwen3-8B ;;
*)
    echo "run.sh: MODEL=$MODEL: use Qwen3-0.6B, Qwen2.5-7B-Instruct, Qwen3-8B, Qwen3-30B-A3B or Qwen3-32B" >&2
    exit 2
    ;;
esac
KEYS=(
    actor_rollout_ref.model.path="$MODELS/$MODEL"
    actor_rollout_ref.rollout.tensor_model_parallel_size="$TENSOR_PARALLEL"
)
if [ "$SIZE" = small ]; then
    KEYS+=(
        data.train_files="$DATA/gsm8k/train.parquet"
        data.val_files="$DATA/gsm8k/test.parquet"
        data.max_prompt_length=512
        data.max_response_length=1024
        actor_rollout_ref.rollout.gpu_memory_utilization=0.5
        trainer.total_epochs=15
    )
else
    KEYS+=(
        data.train_files="$DATA/dapo/train.parquet"
        data.val_files="$DATA/dapo/test.parquet"
        data.max_prompt_length=2048
        data.max_response_length=8192
        actor_rollout_ref.rollout.gpu_memory_utilization=0.35
        actor_rollout_ref.rollout.val_kwargs.do_sample=True
        actor_rollout_ref.rollout.val_kwargs.temperature=1.0
        actor_rollout_ref.rollout.val_kwargs.n=16
        reward.reward_manager.name=dapo
        +reward.reward_kwargs.max_resp_len=8192
        +reward.reward_kwargs.overlong_buffer_cfg.enable=True
        +reward.reward_kwargs.overlong_buffer_cfg.len=2048
        +reward.reward_kwargs.overlong_buffer_cfg.penalty_factor=1.0
        trainer.total_epochs=3
    )
fi
# Without thinking, responses end within the limit. Remove the key and raise data.max_response_length to train with it.
if [[ $MODEL == Qwen3-* ]]; then KEYS+=(+data.apply_chat_template_kwargs.enable_thinking=False); fi

# ---- keys that depend on the algorithm ----

case "$ALGORITHM-$SIZE" in
grpo-small) KEYS+=(data.train_batch_size=256 actor_rollout_ref.actor.ppo_mini_batch_size=64 actor_rollout_ref.rollout.n=8) ;;
grpo-large)
    KEYS+=(data.train_batch_size=128 actor_rollout_ref.actor.ppo_mini_batch_size=32 actor_rollout_ref.rollout.n=16)
    KEYS+=(actor_rollout_ref.actor.optim.lr_warmup_steps=10)
    ;;
ppo-*) KEYS+=(data.train_batch_size=512 actor_rollout_ref.actor.ppo_mini_batch_size=128 actor_rollout_ref.rollout.n=1) ;;
*)
    echo "run.sh: ALGORITHM=$ALGORITHM: use grpo or ppo" >&2
    exit 2
    ;;
esac
if [ "$ALGORITHM" = grpo ]; then
    KEYS+=(algorithm.adv_estimator=grpo actor_rollout_ref.actor.clip_ratio_high=0.28)
else
    KEYS+=(
        algorithm.adv_estimator=gae
        critic.model.path="$MODELS/$CRITIC"
        critic.optim.lr=1e-5
        critic.ppo_max_token_len_per_gpu=16384
        trainer.critic_warmup=5
    )
fi

NAME=${MODEL,,}
NAME=${NAME%-instruct}

python3 -m verl.trainer.main_ppo \
    algorithm.rollout_correction.rollout_is=token \
    data.filter_overlong_prompts=True \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.rollout.name=vllm \
    trainer.project_name=ascend950 \
    trainer.experiment_name="${ALGORITHM}_${NAME//-/_}" \
    trainer.test_freq=10 \
    trainer.save_freq=20 \
    trainer.max_actor_ckpt_to_keep=2 \
    "${KEYS[@]}" \
    "${MACHINE[@]}" \
    "$@"
