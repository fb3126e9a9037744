"""`trainer`: length of the run, devices, validation, checkpoints and logs."""

# ruff: noqa: RUF009  (key, unsupported and section return dataclass fields)
from __future__ import annotations

from dataclasses import dataclass

from verl.config import names
from verl.config.conditions import any_of, same_as, validates, when
from verl.config.schema import ConfigSection, key, section, unsupported
from verl.config.watchdog import WatchdogConfig

_SEPARATE = when("trainer.v1.trainer_mode", "separate_async")
_COLOCATE = when("trainer.v1.trainer_mode", "colocate_async")


@dataclass
class HybridRolloutConfig(ConfigSection):
    """Replicas on the trainer's devices while it waits."""

    enable_switch: bool = unsupported(False, "replicas on the trainer's devices while it waits")


@dataclass
class SeparateAsyncConfig(ConfigSection):
    """Generation during training, on devices of the replicas' own."""

    num_warmup_batches: int = key(
        1,
        "training batches that are generated ahead, as async_training.staleness_threshold",
        unit="training batches",
        at_least=0,
    )
    parameter_sync_step: int = key(
        4,
        "local updates of the trainer between two weight updates, as async_training.trigger_parameter_sync_step; "
        "data.train_batch_size is this number of mini-batches",
        unit="local updates",
        at_least=1,
    )
    hybrid_rollout: HybridRolloutConfig = section(
        HybridRolloutConfig, "replicas on the trainer's devices while it waits"
    )


@dataclass
class ColocateAsyncConfig(ConfigSection):
    """Partial rollouts on the trainer's devices."""

    num_warmup_batches: int = key(
        1,
        "training batches in progress besides the one that a step trains on; sets data.gen_batch_size",
        unit="training batches",
        choices=(1,),
    )


@dataclass
class V1SamplerConfig(ConfigSection):
    """Age of the samples that a step trains on."""

    max_off_policy_threshold: int = key(
        8,
        "maximum weight updates between sampling a token and training on it, as rollout.max_staleness",
        unit="updates",
        at_least=1,
    )
    max_off_policy_strategy: str = key(
        "drop",
        "prompts that reach the threshold; both values: a step waits for them, so that none exceeds it or is dropped",
        choices=("drop", "wait"),
    )


@dataclass
class V1Config(ConfigSection):
    """Kind of training loop."""

    trainer_mode: str = key(
        "sync",
        "sync: rollout and training alternate; colocate_async: with partial rollouts (rollout.partial_rollout); "
        "separate_async: generation goes on during training (async_training)",
        choices=("sync", "colocate_async", "separate_async"),
    )
    separate_async: SeparateAsyncConfig = section(
        SeparateAsyncConfig, "generation during training, on devices of the replicas' own", only_with=_SEPARATE
    )
    colocate_async: ColocateAsyncConfig = section(
        ColocateAsyncConfig, "partial rollouts on the trainer's devices", only_with=_COLOCATE
    )
    sampler: V1SamplerConfig = section(
        V1SamplerConfig, "age of the samples that a step trains on", only_with=any_of(_SEPARATE, _COLOCATE)
    )


@dataclass
class TrainerConfig(ConfigSection):
    """Length of the run, devices, validation, checkpoints and logs."""

    project_name: str = key("verl_examples", "name of the project in logs and paths")
    experiment_name: str = key("gsm8k", "name of the run in logs and paths")
    device: str = key(
        "auto",
        "device of the trainer and the replicas; auto: an accelerator if there is one",
        choices=("auto", "cpu", "cuda", "npu"),
    )
    n_gpus_per_node: int = key(
        8, "trainer ranks per node: one per device, or any number of processes on a CPU", unit="ranks", at_least=1
    )
    nnodes: int = key(
        1,
        "nodes of the trainer; several nodes need a Ray cluster (ray_kwargs.ray_init.address) and a shared file system "
        "for checkpoints",
        at_least=1,
    )
    seed: int = key(0, "seed of new weights and of sampling, and of the data order if data.seed is null", at_least=0)
    total_epochs: int = key(
        30,
        "passes over the training prompts",
        unit="epochs",
        at_least=1,
        only_with=when("total_training_steps", None),
    )
    total_training_steps: int | None = key(
        None, "training steps; null: total_epochs decides", unit="training steps", at_least=1
    )
    test_freq: int = key(
        -1, "steps between validations; the last step also validates; -1: never", unit="training steps"
    )
    val_before_train: bool = key(True, "validate before the first step")
    check_consistency: bool = key(
        True,
        "compare the log-probabilities of engine and trainer before the first step and after the first update; stop if "
        "they differ by more than rounding explains",
    )
    val_only: bool = key(False, "validate once and stop")
    save_freq: int = key(
        -1, "steps between checkpoints; the last step also writes one; -1: never", unit="training steps"
    )
    max_actor_ckpt_to_keep: int | None = key(
        None,
        "checkpoints to keep; null: all",
        at_least=1,
        only_with=when("save_freq", at_least=1, reason="without checkpoints (trainer.save_freq)"),
    )
    on_save_error: str = key(
        "stop",
        "if the disk refuses a checkpoint: stop the run, or continue it and try again at the next save; the last save "
        "must succeed",
        choices=("stop", "continue"),
        only_with=when("save_freq", at_least=1, reason="without checkpoints (trainer.save_freq)"),
    )
    default_local_dir: str = key(
        "checkpoints/${trainer.project_name}/${trainer.experiment_name}", "directory of checkpoints and logs", path=True
    )
    resume_mode: str = key(
        "auto",
        "auto: resume from the last checkpoint in default_local_dir, if there is one; resume_path: resume from "
        "resume_from_path",
        choices=("auto", "disable", "resume_path"),
    )
    resume_from_path: str | None = key(
        None,
        "directory global_step_N to resume from",
        path=True,
        only_with=when("resume_mode", "resume_path"),
    )
    logger: list[str] = key(
        ["console", "file"],
        "destinations of the metrics",
        choices=names.LOGGERS,
        unsupported=names.UNSUPPORTED_LOGGERS,
        use=f"use any of {', '.join(names.LOGGERS)}",
    )
    log_val_generations: int = key(
        0, "validation samples to log as text", unit="samples", at_least=0, only_with=validates
    )
    rollout_data_dir: str | None = key(
        None, "directory for all training samples as JSON lines; null: not written", path=True
    )
    validation_data_dir: str | None = key(
        None, "directory for all validation samples as JSON lines; null: not written", path=True, only_with=validates
    )
    timeline: str | None = key(
        None, "file for a timeline of all processes in the format of Perfetto; null: not written", path=True
    )
    balance_batch: bool = key(True, "distribute samples so that all ranks get about the same number of tokens")
    use_v1: bool = key(True, "accepted for compatibility; there is only one training loop")
    v1: V1Config = section(V1Config, "kind of training loop")
    watchdog: WatchdogConfig = section(WatchdogConfig, "how dead, silent and hanging processes are noticed")
    rollout_lag: int = key(
        0,
        "0: generation and training alternate; 1: the next batch is generated during training, with weights that are "
        "one update older",
        unit="training steps",
        choices=(0, 1),
    )
    critic_warmup: int = key(0, "steps at the start that train the critic only", unit="training steps", at_least=0)
    max_critic_ckpt_to_keep: int | None = unsupported(
        None,
        "a different number of checkpoints for the critic",
        "use max_actor_ckpt_to_keep: a checkpoint contains both models",
        same_if=any_of(same_as("trainer.max_actor_ckpt_to_keep"), when("run.needs_critic", False, words="no critic")),
    )
    default_hdfs_dir: str | None = unsupported(None, "copies on HDFS")
    del_local_ckpt_after_load: bool = unsupported(False, "deleting a checkpoint after it is loaded")
    esi_redundant_time: int = unsupported(0, "saving before an instance expires")
