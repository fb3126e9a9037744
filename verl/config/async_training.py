"""`async_training` and `rollout`, the sections of fully asynchronous runs: generation goes on during training."""

from __future__ import annotations

from dataclasses import dataclass

from verl.config.conditions import when
from verl.config.schema import ConfigSection, key, unsupported

_DYNAMIC = when("use_dynamic_resource_scheduling", reason="without dynamic resource scheduling")


@dataclass
class AsyncTrainingConfig(ConfigSection):
    """Generation that goes on during training."""

    enable: bool = key(
        False,
        "generate during training, on devices of the replicas' own; "
        "verl.experimental.fully_async_policy.fully_async_main sets it",
    )
    staleness_threshold: float = key(
        0.1,
        "prompts that may be generated ahead of a weight update, as a fraction of the prompts between two updates; "
        "rounded up, it is the largest age of a token in updates; 0: nothing is generated ahead",
        at_least=0,
    )
    trigger_parameter_sync_step: int = key(
        4,
        "local updates of the trainer between two weight updates of the replicas; together they are a training step",
        unit="local updates",
        at_least=1,
    )
    require_batches: int = key(
        1, "mini-batches (actor.ppo_mini_batch_size prompts each) in a local update", unit="mini-batches", at_least=1
    )
    partial_rollout: bool = key(
        True,
        "True: a weight update cuts responses, which continue under the new weights; False: it waits for the prompts "
        "in progress",
    )
    concurrent_samples_per_replica: int = key(
        16, "prompts that a replica generates at the same time, each with rollout.n samples", at_least=1
    )
    use_rollout_log_probs: bool = key(
        True,
        "old_log_probs are those of the rollout",
        only=(True,),
        use="use algorithm.rollout_correction.bypass_mode=False, with which the trainer computes them",
    )
    use_trainer_do_validate: bool = unsupported(False, "validation on the trainer's devices")
    use_dynamic_resource_scheduling: bool = unsupported(False, "replicas on the trainer's devices while it waits")
    dynamic_schedule_policy: str = key("default", "policy of dynamic resource scheduling", only_with=_DYNAMIC)
    dynamic_schedule_deactivate_ratio: float = key(
        0.3, "fraction of the samples at which it takes devices back", only_with=_DYNAMIC
    )
    dynamic_schedule_enable_rebalance: bool = key(
        True, "distribute requests in flight over added replicas", only_with=_DYNAMIC
    )


@dataclass
class AsyncRolloutConfig(ConfigSection):
    """Length of an asynchronous run."""

    total_rollout_steps: int | None = key(
        None,
        "prompts that the whole run generates; the steps of the run are this number, divided by the prompts of a step",
        unit="prompts",
        at_least=1,
    )
