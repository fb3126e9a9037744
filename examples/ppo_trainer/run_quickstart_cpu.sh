#!/usr/bin/env bash
# Trains the model of the quickstart on its task with PPO: a critic of the same size learns the value of each token
# (GAE), whereas GRPO compares the samples of a prompt. Takes a few minutes on two CPU cores; the rollout runs in MXFP8.
# Only the keys for PPO are here; data, model and all other keys are those of the quickstart.
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
