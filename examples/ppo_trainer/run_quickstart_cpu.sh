#!/usr/bin/env bash
# Trains the quickstart's model on the quickstart's task with PPO: a critic of the same size learns the value of each
# token beside the policy (GAE), where GRPO compares the samples of a prompt. A few minutes on two CPU cores, rollout in
# MXFP8. These are the keys that PPO adds; data, model and the rest are the quickstart's.
#
#   examples/ppo_trainer/run_quickstart_cpu.sh [key=value ...]
set -euo pipefail
cd "$(dirname "$0")/../.."

exec examples/quickstart/run.sh \
    algorithm.adv_estimator=gae \
    algorithm.gamma=1.0 \
    algorithm.lam=0.95 \
    critic.model.path=outputs/quickstart/model \
    critic.optim.lr=1e-3 \
    critic.ppo_mini_batch_size=16 \
    critic.cliprange_value=0.5 \
    trainer.critic_warmup=2 \
    trainer.project_name=ppo_quickstart \
    trainer.default_local_dir=outputs/ppo_quickstart \
    "$@"
