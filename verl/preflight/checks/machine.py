"""The machine: device, ports, directories, packages, memory."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from verl.config import names
from verl.config.ppo import PPOConfig
from verl.config.roles import needs_critic
from verl.preflight.checks.batches import rollout_devices
from verl.preflight.checks.transport import replica_nodes
from verl.preflight.estimate import MemoryEstimate
from verl.preflight.findings import Findings
from verl.preflight.plan import size
from verl.preflight.target import Hardware, Scope
from verl.utils.devices import count_devices, detect_device
from verl.utils.host import cpu_cores
from verl.utils.network import ray_cluster
from verl.utils.vllm.npu_settings import npu_environment, npu_environment_problems

# Linux's limits; longer paths are errors only when a directory is made.
_LONGEST_NAME, _LONGEST_PATH = 255, 4095


def check_device(config: PPOConfig, scope: Scope, found: Findings) -> str | None:
    """The device, or None where it is not there."""
    if scope.hardware is not None:
        return _check_planned(config, scope.hardware, found)
    try:
        device = detect_device(config.trainer.device)
    except ValueError as error:
        plan = "" if scope.starting else "; or plan for other hardware, as with --device npu:ascend950"
        found.errors.append(f"{error}{plan}")
        return None
    ranks, rollout = config.trainer.n_gpus_per_node, config.actor_rollout_ref.rollout
    # Devices may be another machine's then; the placement in that cluster knows how many there are.
    joins = ray_cluster(os.environ, asked=config.ray_kwargs.ray_init.get("address")) is not None
    if config.trainer.nnodes > 1 and not joins:
        found.errors.append(
            f"trainer.nnodes={config.trainer.nnodes}: this machine alone is one node; start Ray on all of them (ray "
            "start) and join it with ray_kwargs.ray_init.address=auto, or use 1"
        )
    if device == "cpu":
        if ranks > cpu_cores():
            found.warnings.append(
                f"trainer.n_gpus_per_node={ranks}: as many processes on {cpu_cores()} cores are slower than fewer; "
                f"use at most {cpu_cores()}"
            )
        return device
    present = count_devices(device)
    if joins:
        return device
    apart = rollout.n_gpus_per_node * rollout.nnodes
    if apart and ranks + apart > present:
        found.errors.append(
            f"actor_rollout_ref.rollout.nnodes={rollout.nnodes}: {apart} devices for the replicas beside "
            f"trainer.n_gpus_per_node={ranks} of the {present} {device} device(s) of this machine; join a cluster "
            "(ray_kwargs.ray_init.address), or use 0, where replicas share the trainer's devices"
        )
    elif ranks > present:
        found.errors.append(
            f"trainer.n_gpus_per_node={ranks}: this machine shows {present} {device} device(s); use at most {present}"
        )
    return device


def _check_planned(config: PPOConfig, hardware: Hardware, found: Findings) -> str | None:
    asked, device = config.trainer.device, hardware.device
    if asked not in ("auto", device):
        found.errors.append(
            f"trainer.device={asked}: planned for --device {hardware.name}; set trainer.device={device}, or auto"
        )
        return None
    rollout, trainer = config.actor_rollout_ref.rollout, config.trainer
    apart = rollout.n_gpus_per_node * rollout.nnodes
    node = max(trainer.n_gpus_per_node, rollout.n_gpus_per_node if apart else 0)
    needed = trainer.nnodes + replica_nodes(config, device)
    if needed > 1 and not config.ray_kwargs.ray_init.get("address"):
        found.notes.append(
            f"the run takes {needed} nodes: start it in a Ray cluster of them (ray start on each, and "
            "ray_kwargs.ray_init.address=auto)"
        )
    if hardware.nodes is None or needed == hardware.nodes:
        return device
    if needed > hardware.nodes:
        found.errors.append(
            f"--nodes {hardware.nodes}: trainer.nnodes={trainer.nnodes} x trainer.n_gpus_per_node="
            f"{trainer.n_gpus_per_node} and actor_rollout_ref.rollout.nnodes={rollout.nnodes} x .n_gpus_per_node="
            f"{rollout.n_gpus_per_node} take {needed} nodes of {node} devices; use --nodes {needed}, or lower "
            f"{'actor_rollout_ref.rollout.nnodes' if apart else 'trainer.nnodes'}"
        )
    else:
        found.warnings.append(
            f"--nodes {hardware.nodes}: the run takes {needed} node(s) of {node} devices, the rest is idle; set "
            f"actor_rollout_ref.rollout.nnodes={rollout.nnodes + hardware.nodes - needed} for replicas on nodes of "
            f"their own, or trainer.nnodes={trainer.nnodes + hardware.nodes - needed} for a larger trainer"
        )
    return device


def check_environment(config: PPOConfig, device: str, environment: Mapping[str, str], found: Findings) -> None:
    """What an engine on an NPU could not work with; its start would say the same."""
    if device == "npu":
        whole = {**environment, **npu_environment(environment)}
        sleeps = config.actor_rollout_ref.rollout.free_cache_engine
        found.errors += npu_environment_problems(whole, sleep_mode=sleeps)


def check_loggers(config: PPOConfig, found: Findings) -> None:
    """Optional packages have to be there before the run, not at its first log."""
    if not config.trainer.logger:
        found.warnings.append("trainer.logger=[]: no metric is written anywhere; use [console,file]")
    for name in config.trainer.logger:
        package, install = names.LOGGER_PACKAGES.get(name, ("", ""))
        if package and importlib.util.find_spec(package) is None:
            found.errors.append(
                f"trainer.logger: {name} needs the package {package}, which is not installed; run `pip install "
                f"{install}`, or take {name} out of the list"
            )


def check_directories(config: PPOConfig, found: Findings) -> None:
    """Directories that the run writes to, and the checkpoint it goes on from."""
    trainer = config.trainer
    folders = ("default_local_dir", "rollout_data_dir", "validation_data_dir")
    for name in folders:
        path = getattr(trainer, name)
        problem = _not_writable(Path(path)) if path else None
        if problem:
            found.errors.append(f"trainer.{name}={path}: {problem}; choose another directory")
    if trainer.timeline:
        path = Path(trainer.timeline)
        problem = "is a directory" if path.is_dir() else _not_writable(path.parent)
        if problem:
            found.errors.append(f"trainer.timeline={path}: {problem}; choose another file")
    _check_contents(config, found)
    if trainer.resume_mode != "resume_path":
        return
    resume = trainer.resume_from_path
    if not resume:
        found.errors.append(
            "trainer.resume_from_path is not set: trainer.resume_mode=resume_path needs a global_step_N directory"
        )
    elif not os.path.isdir(resume):
        found.errors.append(f"trainer.resume_from_path={resume}: no such directory; give a global_step_N directory")
    elif not re.fullmatch(r"global_step_\d+", Path(resume).name):
        found.errors.append(f"trainer.resume_from_path={resume}: is not a global_step_N directory; give one")


def _check_contents(config: PPOConfig, found: Findings) -> None:
    if config.trainer.save_freq <= 0:
        return
    roles = {"actor_rollout_ref.actor": config.actor_rollout_ref.actor}
    roles |= {"critic": config.critic} if needs_critic(config) else {}
    for name, role in roles.items():
        if not role.checkpoint.save_contents:
            found.errors.append(
                f"{name}.checkpoint.save_contents=[]: nothing of it would be saved every trainer.save_freq="
                f"{config.trainer.save_freq} steps; use [model,optimizer,extra], or trainer.save_freq=-1"
            )


def _not_writable(path: Path) -> str | None:
    if len(os.fsencode(path)) > _LONGEST_PATH or any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts):
        return f"is too long (a name may have {_LONGEST_NAME} bytes, the whole {_LONGEST_PATH})"
    nearest = next(folder for folder in (path, *path.parents) if folder.exists() or folder.is_symlink())
    if not nearest.is_dir():
        return f"{nearest} is not a directory"
    return None if os.access(nearest, os.W_OK | os.X_OK) else f"{nearest} is not writable"


def check_ports(config: PPOConfig, found: Findings) -> None:
    """Fixed ports of the replicas' HTTP endpoints have to be free."""
    server = config.actor_rollout_ref.rollout.server
    if not server.enable_http:
        return
    field = f"actor_rollout_ref.rollout.server.port={server.port}"
    loopback = server.host in ("localhost", "::1") or server.host.startswith("127.")
    if loopback and max(config.trainer.nnodes, config.actor_rollout_ref.rollout.nnodes) > 1:
        found.warnings.append(
            f"actor_rollout_ref.rollout.server.host={server.host}: each replica is reached on its own node alone; set "
            "an address that other nodes reach, or leave actor_rollout_ref.rollout.server.enable_http=False"
        )
    replicas = max(1, rollout_devices(config) // config.actor_rollout_ref.rollout.tensor_model_parallel_size)
    for rank in range(replicas if server.port else 1):
        port = server.port + rank if server.port else 0
        if port > 65535:
            found.errors.append(f"{field}: replica {rank} would need port {port}; use at most {65536 - replicas}")
            return
        error = _bind_error(server.host, port)
        if error is None:
            continue
        if error.errno == errno.EADDRINUSE:
            found.errors.append(f"{field}: port {port} on {server.host} is in use (replica {rank}); use another, or 0")
        else:
            found.errors.append(
                f"actor_rollout_ref.rollout.server.host={server.host}, port={port}: cannot be listened on "
                f"({error.strerror or error}); use host=127.0.0.1, or another port"
            )
        return


def _bind_error(host: str, port: int) -> OSError | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As the server binds: a port whose last connection is still closing is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None


def check_memory(estimate: MemoryEstimate | None, available: int | None, found: Findings) -> None:
    """The estimate against what is free."""
    if estimate is None or available is None or estimate.total_bytes <= available:
        return
    found.warnings.append(
        f"about {size(estimate.total_bytes)} of host memory are needed and {size(available)} are available: lower "
        "trainer.n_gpus_per_node, actor_rollout_ref.rollout.max_num_seqs, the micro-batch size or the token budget"
    )
