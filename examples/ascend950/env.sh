# Sourced by the scripts of this folder: the environment that a run needs, and the keys that depend on the machine.
# Variables that choose between machines, with their defaults:
#
#   PLATFORM=npu         npu: Ascend 950; cuda: GPUs
#   QUANTIZATION=ascend  of the rollout. npu: ascend (MXFP8) or null; cuda: fp8 (its default) or null
#   NODES=1              nodes of the trainer; replicas take turns with it on their devices
#   ROLLOUT_NODES=0      more nodes, in the place of that for the replicas: they generate the next batch while it trains
#   DEVICES=8            devices of a node
#   MODELS=~/models      directory of the models:  hf download Qwen/Qwen3-8B --local-dir ~/models/Qwen3-8B
#   DATA=~/data          what examples/data_preprocess writes
#
# With several nodes, MODELS is the same on each of them and checkpoints go to a file system that they share
# (docs/several_nodes.md). Source this file on each before Ray is started there, since Ray's processes have the environment
# that `ray start` had:
#
#   source examples/ascend950/env.sh && ray start --head --port=6379                   # the node that starts the run
#   source examples/ascend950/env.sh && ray start --address=IP_OF_THE_FIRST:6379       # the others
: "${PLATFORM:=npu}" "${NODES:=1}" "${ROLLOUT_NODES:=0}" "${DEVICES:=8}" "${MODELS:=$HOME/models}" "${DATA:=$HOME/data}"

# $1 is the name of an allocator's variable: leaves what else it sets.
without_expandable_segments() {
    local IFS=, setting kept=()
    for setting in ${!1:-}; do [[ ${setting,,} == *expandable_segments*true* ]] || kept+=("$setting"); done
    if [ "${#kept[@]}" = 0 ]; then unset "$1"; else export "$1=${kept[*]}"; fi
}

case "$PLATFORM" in
npu)
    : "${QUANTIZATION:=ascend}"
    collective=hccl
    # CANN's own variables, where a shell has not set them at login.
    if [ -z "${ASCEND_HOME_PATH:-}" ]; then
        strict="$-"
        set +eu  # which they are not written for
        for file in /usr/local/Ascend/ascend-toolkit/set_env.sh /usr/local/Ascend/nnal/atb/set_env.sh; do
            if [ -f "$file" ]; then source "$file"; fi
        done
        [[ $strict != *e* ]] || set -e
        [[ $strict != *u* ]] || set -u
    fi
    # Weights in NZ format cannot be replaced; waking the engine up would raise.
    export VLLM_ASCEND_ENABLE_NZ=0
    # Expandable segments exclude the memory pool of a sleeping engine.
    without_expandable_segments PYTORCH_NPU_ALLOC_CONF
    # Unset, vLLM loads all plugins; a list would have to hold both vllm-ascend's and verl's.
    unset VLLM_PLUGINS
    # How long ranks wait for each other, in seconds: one that reads large weights from a slow disk is late.
    export HCCL_CONNECT_TIMEOUT="${HCCL_CONNECT_TIMEOUT:-1200}"
    # Trainer, engine and weight updates are processes of their own on one NPU, for which HCCL has one port unless told
    # otherwise. A run sets both where they are not set.
    export HCCL_HOST_SOCKET_PORT_RANGE="${HCCL_HOST_SOCKET_PORT_RANGE:-auto}"
    export HCCL_NPU_SOCKET_PORT_RANGE="${HCCL_NPU_SOCKET_PORT_RANGE:-auto}"
    # Of the rollout alone: 1 queues operators on the host, 2 does it in two stages, 0 not at all. vllm-ascend's default:
    # export VLLM_ASCEND_TASK_QUEUE_ENABLE=1
    ;;
cuda)
    : "${QUANTIZATION:=fp8}"
    collective=nccl
    # As on an NPU.
    without_expandable_segments PYTORCH_CUDA_ALLOC_CONF
    unset VLLM_PLUGINS
    ;;
*)
    echo "env.sh: PLATFORM=$PLATFORM: use npu or cuda" >&2
    return 2
    ;;
esac

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
        # The engine has the devices to itself, where the scripts give it what the trainer leaves.
        actor_rollout_ref.rollout.gpu_memory_utilization=0.85
        trainer.rollout_lag=1
    )
fi
