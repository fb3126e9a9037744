"""`trainer`: length of the run, devices, validation, checkpoints, logs."""

# ruff: noqa: RUF009  (key, planned and section make dataclass fields)
from __future__ import annotations

from dataclasses import dataclass

from verl.config import names
from verl.config.schema import key, planned, section


@dataclass
class V1Config:
    """The kind of loop."""

    trainer_mode: str = key(
        "sync",
        "sync: rollout and training take turns",
        choices=("sync",),
        planned=("colocate_async", "separate_async"),
        use="use sync; with trainer.rollout_lag=1 the next batch is generated while one is trained on",
    )


@dataclass
class TrainerConfig:
    """Length of the run, devices, validation, checkpoints, logs."""

    project_name: str = key("verl_examples", "name of the project in logs and paths")
    experiment_name: str = key("gsm8k", "name of the run in logs and paths")
    device: str = key("auto", "auto takes an accelerator if there is one", choices=("auto", "cpu", "cuda", "npu"))
    n_gpus_per_node: int = key(
        8, "trainer ranks of a node: its devices, or processes where the device is a CPU", unit="ranks", at_least=1
    )
    nnodes: int = key(
        1,
        "nodes of the trainer; more than one are a Ray cluster's (ray_kwargs.ray_init.address), and share the file "
        "system that checkpoints go to",
        at_least=1,
    )
    seed: int = key(0, "seed of weights made anew, of sampling, and of data order without data.seed", at_least=0)
    total_epochs: int = key(30, "passes over the training prompts", unit="epochs", at_least=1)
    total_training_steps: int | None = key(
        None, "training steps in place of total_epochs", unit="training steps", at_least=1
    )
    test_freq: int = key(-1, "validate every so many steps and after the last, -1 for never", unit="training steps")
    val_before_train: bool = key(True, "validate before the first step")
    val_only: bool = key(False, "validate once and stop")
    save_freq: int = key(
        -1, "write a checkpoint every so many steps and after the last, -1 for never", unit="training steps"
    )
    max_actor_ckpt_to_keep: int | None = key(None, "checkpoints to keep, null for all", at_least=1)
    default_local_dir: str = key(
        "checkpoints/${trainer.project_name}/${trainer.experiment_name}", "directory of checkpoints and logs", path=True
    )
    resume_mode: str = key(
        "auto",
        "auto: go on from the last checkpoint in default_local_dir, if any",
        choices=("auto", "disable", "resume_path"),
    )
    resume_from_path: str | None = key(
        None, "global_step_N directory to go on from where resume_mode is resume_path", path=True
    )
    logger: list[str] = key(
        ["console", "file"],
        "where metrics go",
        choices=names.LOGGERS,
        planned=names.UNSUPPORTED_LOGGERS,
        use=f"use any of {', '.join(names.LOGGERS)}",
    )
    log_val_generations: int = key(0, "validation samples to log as text", unit="samples", at_least=0)
    rollout_data_dir: str | None = key(
        None, "directory for all training samples as JSON lines, null for none", path=True
    )
    validation_data_dir: str | None = key(
        None, "directory for all validation samples as JSON lines, null for none", path=True
    )
    timeline: str | None = key(
        None, "file for a timeline of all processes, which Perfetto opens, null for none", path=True
    )
    balance_batch: bool = key(True, "even out the ranks' tokens")
    use_v1: bool = key(True, "there is one loop, which both values mean")
    v1: V1Config = section(V1Config, "the kind of loop")
    rollout_lag: int = key(
        0,
        "1: the next batch is generated while one is trained on, by weights one update older; 0: they take turns",
        unit="training steps",
        choices=(0, 1),
    )
    critic_warmup: int = key(
        0, "steps in which the critic alone learns, before the policy joins in", unit="training steps", at_least=0
    )
    max_critic_ckpt_to_keep: int | None = planned(
        None, "keeping another number of the critic's checkpoints", "use max_actor_ckpt_to_keep: a checkpoint has both"
    )
    default_hdfs_dir: str | None = planned(None, "copies on HDFS")
    del_local_ckpt_after_load: bool = planned(False, "deleting a checkpoint once loaded")
    esi_redundant_time: int = planned(0, "saving before an instance expires")
