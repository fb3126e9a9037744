"""The flow of prompts from generation to training, in runs that carry prompts in progress over a weight update.

`complete` derives the keys of other sections that a fully asynchronous run determines, `resolve_stream` the flow.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from verl.config.build import MAX_INT
from verl.config.ppo import PPOConfig
from verl.config.rollout_correction import resolve

PREFIX = "async_training."
# Meaning of `rollout.max_staleness=null` in a run that is not fully asynchronous.
DEFAULT_MAX_STALENESS = 8
_AGE = "actor_rollout_ref.rollout.max_staleness"
_SET_BY_MODE = {"separate_async": (_AGE,), "colocate_async": (_AGE, "data.gen_batch_size")}


@dataclass(frozen=True)
class Stream:
    """How prompts flow from generation to training. A step is everything between two weight updates of the replicas.

    Attributes:
        updates: local updates in a step.
        prompts: prompts that each of them trains on.
        in_progress: largest number of prompts that are in progress at the start of a step or start during it; a
            prompt is in progress until it is trained on.
        at_once: prompts that a replica generates at the same time; None: all that are in progress.
        max_staleness: largest age of a token that is trained on, in weight updates.
        drain: a weight update waits until no prompt is being generated.
    """

    updates: int
    prompts: int
    in_progress: int
    at_once: int | None
    max_staleness: int
    drain: bool


def carries_prompts(config: PPOConfig) -> bool:
    """Return True if prompts in progress continue in the next step."""
    return config.async_training.enable or config.actor_rollout_ref.rollout.partial_rollout


def carrying_key(config: PPOConfig) -> str:
    """Return key and value by which prompts in progress continue in the next step."""
    if config.async_training.enable:
        return f"{PREFIX}enable=True"
    return "actor_rollout_ref.rollout.partial_rollout=True"


def prompts_per_step(config: PPOConfig) -> int:
    """Return the prompts between two weight updates of a run with `async_training.enable`."""
    options = config.async_training
    mini_batch = config.actor_rollout_ref.actor.ppo_mini_batch_size
    return options.trigger_parameter_sync_step * options.require_batches * mini_batch


def resolve_stream(config: PPOConfig) -> Stream | None:
    """Return the flow of prompts of a completed config; None if no prompt is carried over a step.

    Without bypass mode the trainer computes `old_log_probs` of a step with the weights at its start. It then waits for
    all prompts of the step, which become one local update.
    """
    if not carries_prompts(config):
        return None
    rollout, options, step = config.actor_rollout_ref.rollout, config.async_training, config.data.train_batch_size
    in_progress = config.data.gen_batch_size or step
    staleness = rollout.max_staleness
    if not options.enable:
        return Stream(1, step, in_progress, None, DEFAULT_MAX_STALENESS if staleness is None else staleness, False)
    updates = options.trigger_parameter_sync_step if resolve(config.algorithm.rollout_correction).bypass_mode else 1
    return Stream(
        updates=updates,
        prompts=step // updates,
        in_progress=in_progress,
        at_once=options.concurrent_samples_per_replica,
        max_staleness=math.ceil(options.staleness_threshold) if staleness is None else staleness,
        drain=not options.partial_rollout,
    )


def training_steps(config: PPOConfig, prompts_per_epoch: int) -> int:
    """Return the number of training steps of a run.

    Args:
        prompts_per_epoch: prompts in one pass over the training data.
    """
    trainer, step = config.trainer, config.data.train_batch_size
    if not config.async_training.enable:
        return trainer.total_training_steps or prompts_per_epoch // step * trainer.total_epochs
    steps = trainer.total_training_steps or prompts_per_epoch * trainer.total_epochs // step
    total = config.rollout.total_rollout_steps
    return steps if total is None else min(steps, total // step)


def complete(config: PPOConfig, given: Collection[str] = ()) -> dict[str, str]:
    """Set the keys of other sections that `async_training` and `trainer.v1.trainer_mode` determine.

    Args:
        given: keys that overrides set.

    Returns:
        Error texts by key, for keys with another value.
    """
    problems = _apply_trainer_mode(config, given)
    return problems | (_apply_async_training(config, given) if config.async_training.enable else {})


def _apply_trainer_mode(config: PPOConfig, given: Collection[str]) -> dict[str, str]:
    """Set the keys that upstream verl's names of training loops stand for; return error texts by key."""
    v1, rollout, options = config.trainer.v1, config.actor_rollout_ref.rollout, config.async_training
    if v1.trainer_mode not in _SET_BY_MODE:
        return {}
    others = sorted(name for name in given if name.startswith(PREFIX) or name in _SET_BY_MODE[v1.trainer_mode])
    if others:
        return {
            name: f"{name} with trainer.v1.trainer_mode={v1.trainer_mode}, which sets it from trainer.v1."
            f"{v1.trainer_mode} and trainer.v1.sampler; set it there, or leave out trainer.v1.trainer_mode"
            for name in others
        }
    rollout.partial_rollout, rollout.max_staleness = True, v1.sampler.max_off_policy_threshold
    if v1.trainer_mode == "colocate_async":
        config.data.gen_batch_size = (1 + v1.colocate_async.num_warmup_batches) * config.data.train_batch_size
        return {}
    separate = v1.separate_async
    options.enable = options.partial_rollout = True
    options.staleness_threshold = float(separate.num_warmup_batches)
    options.trigger_parameter_sync_step, options.require_batches = separate.parameter_sync_step, 1
    # All prompts start at once; the engine queues them.
    options.concurrent_samples_per_replica = max(1, (1 + separate.num_warmup_batches) * prompts_per_step(config))
    return {}


def _apply_async_training(config: PPOConfig, given: Collection[str]) -> dict[str, str]:
    """Set the batch sizes of a fully asynchronous run; return error texts by key."""
    data, options = config.data, config.async_training
    # A number below 1 has its own error later.
    step, problems = max(1, prompts_per_step(config)), dict[str, str]()
    in_progress = (1 + options.staleness_threshold) * step
    if in_progress > MAX_INT:
        problems[f"{PREFIX}staleness_threshold"] = (
            f"{PREFIX}staleness_threshold={options.staleness_threshold}: {in_progress:g} prompts in progress at "
            f"a time, at most {MAX_INT} are possible; lower it"
        )
    in_progress = int(min(in_progress, MAX_INT))
    chosen = "data.train_batch_size" in given or data.train_batch_size != type(data)().train_batch_size
    if chosen and data.train_batch_size not in (0, step):
        problems["data.train_batch_size"] = (
            f"data.train_batch_size={data.train_batch_size}: a fully asynchronous run trains on {step} prompts between "
            f"two weight updates (async_training.trigger_parameter_sync_step={options.trigger_parameter_sync_step} x "
            f"async_training.require_batches={options.require_batches} x actor_rollout_ref.actor.ppo_mini_batch_size="
            f"{config.actor_rollout_ref.actor.ppo_mini_batch_size}); use {step}, or 0"
        )
    if data.gen_batch_size not in (None, 1, in_progress):
        problems["data.gen_batch_size"] = (
            f"data.gen_batch_size={data.gen_batch_size}: a fully asynchronous run starts its prompts one by one; use 1"
        )
    data.train_batch_size, data.gen_batch_size = step, in_progress
    config.actor_rollout_ref.rollout.partial_rollout = options.partial_rollout
    return problems
