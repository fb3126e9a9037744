"""Checks of `async_training`: devices, the bound of the staleness, and the length of the run."""

from __future__ import annotations

from verl.config.errors import ConfigError
from verl.config.ppo import PPOConfig
from verl.config.rollout_correction import resolve
from verl.config.stream import PREFIX
from verl.preflight.findings import Findings

_ROLLOUT = "actor_rollout_ref.rollout"


def check_async_training(config: PPOConfig, found: Findings) -> None:
    """Check a fully asynchronous run."""
    options, rollout = config.async_training, config.actor_rollout_ref.rollout
    if not options.enable:
        return
    if not rollout.nnodes:
        found.errors.append(
            f"{_ROLLOUT}.nnodes=0 in a fully asynchronous run: the replicas generate while the trainer works, so they "
            f"need devices of their own; set rollout.nnodes=1 and rollout.n_gpus_per_node, or start "
            f"verl.trainer.main_ppo with {_ROLLOUT}.partial_rollout=True"
        )
    if not options.staleness_threshold:
        found.warnings.append(
            f"{PREFIX}staleness_threshold=0: synchronous training, in which the replicas wait for the weight update "
            "after the last prompt of a step; use e.g. 0.5 to generate during training"
        )
    if rollout.max_staleness is not None and rollout.max_staleness < options.staleness_threshold:
        found.errors.append(
            f"{_ROLLOUT}.max_staleness={rollout.max_staleness}: {PREFIX}staleness_threshold="
            f"{options.staleness_threshold:g} generates prompts that are older when they are trained on; leave it out, "
            f"or use at least {PREFIX}staleness_threshold"
        )
    total, step = config.rollout.total_rollout_steps, config.data.train_batch_size
    if total is not None and total < step:
        found.add_size_error(
            f"rollout.total_rollout_steps={total}: a training step takes {step} prompts "
            f"({PREFIX}trigger_parameter_sync_step x {PREFIX}require_batches x "
            f"actor_rollout_ref.actor.ppo_mini_batch_size), so the run would have none; use at least {step}"
        )
    if options.trigger_parameter_sync_step > 1 and not _bypasses(config):
        found.notes.append(
            f"algorithm.rollout_correction.bypass_mode=False: old_log_probs are computed with the weights at the start "
            f"of a step, so that the {options.trigger_parameter_sync_step} local updates of a step "
            f"({PREFIX}trigger_parameter_sync_step) wait for all of its prompts"
        )


def _bypasses(config: PPOConfig) -> bool:
    """Return True in bypass mode, and if an invalid section leaves that open."""
    try:
        return resolve(config.algorithm.rollout_correction).bypass_mode
    except ConfigError:
        return True  # check_rollout_correction reports it
