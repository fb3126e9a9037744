"""Checks of `trainer`: device, nodes and ranks, generation ahead, warm-up, loggers, directories."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path

from verl.config import names
from verl.config.engine_pools import engine_pools
from verl.config.ppo import PPOConfig
from verl.config.roles import needs_critic
from verl.config.stream import carries_prompts, carrying_key
from verl.preflight.findings import Findings
from verl.preflight.placement import replica_nodes, standalone_devices
from verl.preflight.target import Hardware, Target
from verl.utils.devices import count_devices, detect_device
from verl.utils.host import cpu_cores
from verl.utils.network import ray_cluster
from verl.utils.quantization.ascend_releases import installed_vllm_ascend, untested_release
from verl.utils.run_lock import lock_holder, locked_text
from verl.utils.vllm.npu_settings import npu_environment, npu_setting_problems

_ROLLOUT = "actor_rollout_ref.rollout"
_JOIN = "ray_kwargs.ray_init.address=auto"
# Linux's limits in bytes. Longer paths cause an error only when a directory is created.
_LONGEST_NAME, _LONGEST_PATH = 255, 4095


def check_device(config: PPOConfig, target: Target, found: Findings) -> str | None:
    """Check devices and nodes; return `cpu`, `cuda` or `npu`, or None if the device is missing."""
    if target.hardware is not None:
        return _check_planned_device(config, target.hardware, found)
    try:
        device = detect_device(config.trainer.device)
    except ValueError as error:
        plan = "" if target.starting else "; to plan for other hardware, use e.g. --device npu:ascend950"
        found.errors.append(f"{error}{plan}")
        return None
    # In a cluster, the devices may be on other machines. Ray's placement checks their number.
    joins_cluster = ray_cluster(os.environ, asked=config.ray_kwargs.ray_init.get("address")) is not None
    if config.trainer.nnodes > 1 and not joins_cluster:
        found.errors.append(
            f"trainer.nnodes={config.trainer.nnodes}: this machine is only one node; start Ray on all nodes (`ray "
            f"start`) and join this cluster with {_JOIN}, or use 1"
        )
    if device == "cpu":
        _check_cores(config.trainer.n_gpus_per_node, found)
    elif not joins_cluster:
        _check_device_count(config, device, found)
    return device


def _check_cores(ranks: int, found: Findings) -> None:
    cores = cpu_cores()
    if ranks > cores:
        found.warnings.append(
            f"trainer.n_gpus_per_node={ranks}: this machine has {cores} cores, and more processes than cores are "
            f"slower than fewer; use at most {cores}"
        )


def _check_device_count(config: PPOConfig, device: str, found: Findings) -> None:
    """Check that this machine has enough accelerators."""
    ranks, present, standalone = config.trainer.n_gpus_per_node, count_devices(device), standalone_devices(config)
    if standalone and ranks + standalone > present:
        found.errors.append(
            f"{_ROLLOUT}.nnodes={config.actor_rollout_ref.rollout.nnodes}: the replicas need {standalone} devices in "
            f"addition to trainer.n_gpus_per_node={ranks}, and this machine shows {present} {device} device(s); join a "
            "cluster (ray_kwargs.ray_init.address), or use 0, so that the replicas share the trainer's devices"
        )
    elif ranks > present:
        found.errors.append(
            f"trainer.n_gpus_per_node={ranks}: this machine shows {present} {device} device(s); use at most {present}"
        )
    else:
        left = present - ranks - standalone
        for pool in engine_pools(config):
            devices = pool.nodes * pool.devices_per_node
            if devices > left:
                found.errors.append(
                    f"{pool.section}.nnodes={pool.nodes}, .n_gpus_per_node={pool.devices_per_node}: the {pool.model} "
                    f"needs {devices} devices, and {max(left, 0)} of the {present} {device} device(s) of this machine "
                    f"are left; lower them or trainer.n_gpus_per_node, or join a cluster ({_JOIN})"
                )
            left -= devices


def _check_planned_device(config: PPOConfig, hardware: Hardware, found: Findings) -> str | None:
    """Check device and nodes against hardware other than this machine; return its device, or None on a mismatch."""
    requested, device = config.trainer.device, hardware.device
    if requested not in ("auto", device):
        found.errors.append(
            f"trainer.device={requested}: does not match --device {hardware.name}; set trainer.device={device}, or auto"
        )
        return None
    trainer, rollout = config.trainer, config.actor_rollout_ref.rollout
    apart = replica_nodes(config, device)
    needed = trainer.nnodes + apart
    if needed > 1 and not config.ray_kwargs.ray_init.get("address"):
        shared = f" (or {max(trainer.nnodes, apart)} with {trainer.n_gpus_per_node + rollout.n_gpus_per_node} devices)"
        found.notes.append(
            f"the run needs {needed} nodes{shared if apart else ''}: start it in a Ray cluster (`ray start` on each "
            f"node, and {_JOIN})"
        )
    if hardware.nodes is None or needed == hardware.nodes:
        return device
    standalone = standalone_devices(config) > 0
    per_node = max(trainer.n_gpus_per_node, rollout.n_gpus_per_node if standalone else 0)
    if needed > hardware.nodes:
        found.errors.append(
            f"--nodes {hardware.nodes}: the run needs {needed} nodes of {per_node} devices (trainer.nnodes="
            f"{trainer.nnodes} x trainer.n_gpus_per_node={trainer.n_gpus_per_node}, {_ROLLOUT}.nnodes={rollout.nnodes} "
            f"x .n_gpus_per_node={rollout.n_gpus_per_node}); use --nodes {needed}, or lower "
            f"{f'{_ROLLOUT}.nnodes' if standalone else 'trainer.nnodes'}"
        )
    else:
        # Engines of other models may be on nodes of their own, or share one with others.
        unused = hardware.nodes - needed - sum(pool.nodes for pool in engine_pools(config))
        if unused <= 0:
            return device
        found.warnings.append(
            f"--nodes {hardware.nodes}: the run needs {needed} node(s) of {per_node} devices, so {unused} would be "
            f"unused; set {_ROLLOUT}.nnodes={rollout.nnodes + unused} for replicas on their own nodes, or "
            f"trainer.nnodes={trainer.nnodes + unused} for a larger trainer"
        )
    return device


def check_environment(config: PPOConfig, device: str, environment: Mapping[str, str], found: Findings) -> None:
    """Check the settings of an engine on an NPU, which the engine's start would also reject."""
    if device == "npu":
        release, rollout = installed_vllm_ascend(), config.actor_rollout_ref.rollout
        found.errors += npu_setting_problems(
            {**environment, **npu_environment(environment, release)},
            sleep_mode=rollout.free_cache_engine,
            engine_kwargs=rollout.engine_kwargs.get("vllm"),
            release=release,
        )
        if release is not None and (warning := untested_release(release)) is not None:
            found.warnings.append(warning)


def check_python_of_workers(config: PPOConfig, found: Findings) -> None:
    """Refuse workers that start through `uv run`: this package has no uv.lock, so that they would never register."""
    environment = config.ray_kwargs.ray_init.get("runtime_env")
    executable = environment.get("py_executable") if isinstance(environment, Mapping) else None
    if isinstance(executable, str) and executable.split()[:1] == ["uv"]:
        found.errors.append(
            f"ray_kwargs.ray_init.runtime_env.py_executable={executable}: not supported, because this package has no "
            "uv.lock; use null, and start the run with the Python of its environment. Scripts of upstream verl do both "
            "with VERL_USE_UV=0 in their environment"
        )


def check_critic_warmup(config: PPOConfig, found: Findings) -> None:
    """Check that there is a critic to warm up, and that the warm-up ends before the run."""
    steps, warmup = config.trainer.total_training_steps, config.trainer.critic_warmup
    if warmup and not needs_critic(config):
        found.errors.append(
            f"trainer.critic_warmup={warmup}: there is no critic with algorithm.adv_estimator="
            f"{config.algorithm.adv_estimator}, so the warm-up would train nothing; leave it out"
        )
    elif steps is not None and warmup >= steps:
        found.warnings.append(
            f"trainer.critic_warmup={warmup}: the run ends after trainer.total_training_steps={steps}, so the policy "
            "is never trained; use a smaller value"
        )


def check_rollout_lag(config: PPOConfig, device: str, found: Findings) -> None:
    """Check that replicas which generate during training have their own memory."""
    rollout, lag = config.actor_rollout_ref.rollout, config.trainer.rollout_lag
    if not lag:
        return
    if device != "cpu" and not rollout.nnodes:
        found.errors.append(
            f"trainer.rollout_lag={lag} with {_ROLLOUT}.nnodes=0: replicas and trainer share the memory of the same "
            "devices, so only one of them can run at a time; give the replicas their own devices with "
            f"{_ROLLOUT}.nnodes=1 and .n_gpus_per_node, or use trainer.rollout_lag=0"
        )
    if carries_prompts(config):
        found.errors.append(
            f"trainer.rollout_lag={lag} with {carrying_key(config)}: both generate ahead of training, the first whole "
            "batches, the second single prompts; use one of the two"
        )


def check_loggers(config: PPOConfig, found: Findings) -> None:
    """Check that the packages of all loggers are installed, so that the run does not fail at its first log."""
    if not config.trainer.logger:
        found.warnings.append("trainer.logger=[]: no metrics are written; use [console,file]")
    for name in config.trainer.logger:
        package, install = names.LOGGER_PACKAGES.get(name, ("", ""))
        if package and importlib.util.find_spec(package) is None:
            found.errors.append(
                f"trainer.logger: {name} needs the package {package}, which is not installed; run `pip install "
                f"{install}`, or remove {name} from the list"
            )


def check_directories(config: PPOConfig, found: Findings) -> None:
    """Check the directories that the run writes to, and the checkpoint that it resumes from."""
    trainer = config.trainer
    folders = {
        "default_local_dir": trainer.default_local_dir,
        "rollout_data_dir": trainer.rollout_data_dir,
        "validation_data_dir": trainer.validation_data_dir,
    }
    for name, folder in folders.items():
        problem = _write_problem(Path(folder)) if folder else None
        if problem:
            found.errors.append(f"trainer.{name}={folder}: {problem}; choose another directory")
    holder = lock_holder(trainer.default_local_dir)
    if holder is not None:
        found.errors.append(locked_text(trainer.default_local_dir, holder))
    if trainer.timeline:
        path = Path(trainer.timeline)
        problem = "is a directory" if path.is_dir() else _write_problem(path.parent)
        if problem:
            found.errors.append(f"trainer.timeline={path}: {problem}; choose another file")
    _check_save_contents(config, found)
    if trainer.resume_mode == "resume_path":
        _check_resume_path(trainer.resume_from_path, found)


def _check_save_contents(config: PPOConfig, found: Findings) -> None:
    if config.trainer.save_freq <= 0:
        return
    contents = {"actor_rollout_ref.actor": config.actor_rollout_ref.actor.checkpoint.save_contents}
    if needs_critic(config):
        contents["critic"] = config.critic.checkpoint.save_contents
    for section, saved in contents.items():
        if not saved:
            found.errors.append(
                f"{section}.checkpoint.save_contents=[]: checkpoints (trainer.save_freq={config.trainer.save_freq}) "
                "would hold nothing of this model; use [model,optimizer,extra], or trainer.save_freq=-1"
            )


def _check_resume_path(path: str | None, found: Findings) -> None:
    if not path:
        found.errors.append(
            "trainer.resume_from_path is not set: trainer.resume_mode=resume_path needs it; give a global_step_N "
            "directory"
        )
    elif not os.path.isdir(path):
        found.errors.append(f"trainer.resume_from_path={path}: no such directory; give a global_step_N directory")
    elif not re.fullmatch(r"global_step_\d+", Path(path).name):
        found.errors.append(f"trainer.resume_from_path={path}: is not a global_step_N directory; give one")


def _write_problem(path: Path) -> str | None:
    """Return the reason why a directory cannot be created or written, or None."""
    if len(os.fsencode(path)) > _LONGEST_PATH or any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts):
        return f"path is too long (at most {_LONGEST_NAME} bytes in a name, {_LONGEST_PATH} in total)"
    nearest = next(folder for folder in (path, *path.parents) if folder.exists() or folder.is_symlink())
    if not nearest.is_dir():
        return f"{nearest} is not a directory"
    return None if os.access(nearest, os.W_OK | os.X_OK) else f"{nearest} is not writable"
