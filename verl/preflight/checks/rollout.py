"""Checks of `actor_rollout_ref.rollout`: sampling, replicas, partial rollouts, HTTP endpoints, transport of weights.

Other modules check three parts of this section: `agent` and `multi_turn` (agent.py), `quantization*` (quantization.py)
and `gpu_memory_utilization` (memory.py).
"""

from __future__ import annotations

import errno
import socket

from verl.config import names
from verl.config.engine_pools import engine_pools
from verl.config.errors import unknown_key
from verl.config.fixed_engine import FixedEngineConfig
from verl.config.ppo import PPOConfig
from verl.config.rollout import MIN_TEMPERATURE, RolloutConfig
from verl.config.sequence_parallel import actor_sequence_parallel
from verl.config.stream import carries_prompts, carrying_key
from verl.config.weight_updates import BACKENDS, full_update_reason, resolve_backend
from verl.preflight.batch_sizes import check_log_prob_limit, longest_sample, nearest_sizes
from verl.preflight.findings import Findings
from verl.preflight.placement import replica_count
from verl.preflight.target import Target

_ROLLOUT = "actor_rollout_ref.rollout"
_PARTIAL = f"{_ROLLOUT}.partial_rollout=True"
_SERVER = f"{_ROLLOUT}.server"
_BACKEND = f"{_ROLLOUT}.checkpoint_engine.backend"
_ENGINE_KWARGS = f"{_ROLLOUT}.engine_kwargs"
_ENGINES = ("vllm", "sglang", "trtllm")
_LARGEST_PORT = 65535
# vLLM arguments that decide about the model and its processes, and the key that gives them to the trainer too.
_MODEL = "actor_rollout_ref.model"
_OWN_KEYS = {
    "model": f"{_MODEL}.path",
    "tokenizer": f"{_MODEL}.tokenizer_path",
    "trust_remote_code": f"{_MODEL}.trust_remote_code",
    "hf_overrides": f"{_MODEL}.override_config",
    "hf_config_path": f"{_MODEL}.override_config",
    "dtype": f"{_ROLLOUT}.dtype",
    "quantization": f"{_ROLLOUT}.quantization",
    "load_format": f"{_ROLLOUT}.load_format",
    "tensor_parallel_size": f"{_ROLLOUT}.tensor_model_parallel_size",
    "data_parallel_size": f"{_ROLLOUT}.data_parallel_size",
    "pipeline_parallel_size": f"{_ROLLOUT}.pipeline_model_parallel_size",
    "max_model_len": f"{_ROLLOUT}.max_model_len",
}


def check_engine_kwargs(config: PPOConfig, found: Findings) -> None:
    """Check that `engine_kwargs` holds arguments for vLLM only, and none that the trainer must know."""
    for name, value in config.actor_rollout_ref.rollout.engine_kwargs.items():
        field = f"{_ENGINE_KWARGS}.{name}"
        if name not in _ENGINES:
            found.errors.append(unknown_key(field, otherwise=f"use {_ENGINE_KWARGS}.vllm"))
        elif not isinstance(value, dict | None):
            found.errors.append(f"{field}={value}: must be a mapping of arguments")
        elif name != "vllm" and value:
            found.errors.append(f"{field} is not supported: use {_ENGINE_KWARGS}.vllm")
        elif value:
            found.errors += [
                f"{field}.{argument}={value[argument]}: would reach the engine but not the trainer; set {key}"
                for argument, key in _OWN_KEYS.items()
                if argument in value
            ]
            if (value.get("additional_config") or {}).get("enable_reduce_sample"):
                found.errors.append(
                    f"{field}.additional_config.enable_reduce_sample=True: vllm-ascend then returns log-probabilities "
                    "of the candidates of its sampler under the ids of other tokens; remove it"
                )


def _check_token_budget(config: PPOConfig, found: Findings) -> None:
    rollout = config.actor_rollout_ref.rollout
    engines: list[tuple[str, RolloutConfig | FixedEngineConfig, int]] = [(_ROLLOUT, rollout, config.max_model_len)]
    engines += [(pool.engine_section, pool.engine, pool.request_tokens) for pool in engine_pools(config)]
    for section, engine, length in engines:
        if max(engine.max_num_batched_tokens, length) < engine.max_num_seqs:
            found.errors.append(
                f"{section}.max_num_batched_tokens={engine.max_num_batched_tokens}: is less than max_num_seqs="
                f"{engine.max_num_seqs}, and each running request needs one token of it in a step; raise it, or lower "
                "max_num_seqs"
            )


def check_rollout(config: PPOConfig, target: Target, found: Findings) -> None:
    """Check sizes of groups, micro-batches and replicas, partial rollouts and the ports of HTTP endpoints."""
    rollout, estimator = config.actor_rollout_ref.rollout, config.algorithm.adv_estimator
    if rollout.n == 1 and estimator in names.GROUP_ESTIMATORS:
        found.warnings.append(
            f"{_ROLLOUT}.n=1 with algorithm.adv_estimator={estimator}: this estimator compares the samples of one "
            "prompt with each other; use n=4 or more"
        )
    if not config.actor_rollout_ref.hybrid_engine and not rollout.nnodes:
        found.errors.append(
            f"actor_rollout_ref.hybrid_engine=False with {_ROLLOUT}.nnodes=0: the replicas have no devices of their "
            f"own; set {_ROLLOUT}.nnodes=1 and .n_gpus_per_node, or hybrid_engine=True"
        )
    actor = config.actor_rollout_ref.actor
    check_log_prob_limit("rollout", rollout, actor, longest_sample(config), actor_sequence_parallel(actor), found)
    _check_tensor_parallel(config, found)
    _check_token_budget(config, found)
    temperature = rollout.val_kwargs.temperature
    if rollout.val_kwargs.do_sample and 0 < temperature < MIN_TEMPERATURE:
        found.errors.append(
            f"{_ROLLOUT}.val_kwargs.temperature={temperature}: vLLM would sample at {MIN_TEMPERATURE} instead; use "
            f"{MIN_TEMPERATURE} or more, or val_kwargs.do_sample=False for greedy decoding"
        )
    if rollout.partial_rollout and not config.async_training.enable:
        _check_partial_rollout(config, found)
    if rollout.prometheus.enable and rollout.disable_log_stats:
        found.errors.append(
            f"{_ROLLOUT}.disable_log_stats=True with {_ROLLOUT}.prometheus.enable=True: the engines would have no "
            "metrics; set disable_log_stats=False"
        )
    if target.hardware is None and rollout.listens:
        _check_host(config, found)
        _check_ports(config, found)


def _check_tensor_parallel(config: PPOConfig, found: Findings) -> None:
    """Check that replicas divide the devices of a node, because an engine runs on one node."""
    rollout = config.actor_rollout_ref.rollout
    field, devices = (
        (f"{_ROLLOUT}.n_gpus_per_node", rollout.n_gpus_per_node)
        if rollout.nnodes
        else ("trainer.n_gpus_per_node", config.trainer.n_gpus_per_node)
    )
    size = rollout.tensor_model_parallel_size
    if devices % size:
        found.add_size_error(
            f"{_ROLLOUT}.tensor_model_parallel_size={size}: must divide {field}={devices}; use "
            f"{nearest_sizes(size, devices, lambda number: devices % number == 0)}"
        )


def _check_partial_rollout(config: PPOConfig, found: Findings) -> None:
    """Check that more prompts are in flight than a step takes, and that the rest fits into the next step."""
    step, in_flight = config.data.train_batch_size, config.data.gen_batch_size
    if in_flight is None:
        found.errors.append(
            f"data.gen_batch_size is not set: with {_PARTIAL} it is the number of prompts in flight; use more than "
            f"data.train_batch_size={step}, at most {2 * step}"
        )
    elif not step < in_flight <= 2 * step:
        found.errors.append(
            f"data.gen_batch_size={in_flight} with {_PARTIAL}: the number of prompts in flight must be above "
            f"data.train_batch_size={step}, and at most twice as large, so that unfinished prompts fit into the next "
            f"step; use {step + 1} to {2 * step}"
        )


def check_carried_prompts(config: PPOConfig, found: Findings) -> None:
    """Check that the prompts of a step are chosen by nothing else, if prompts are carried over to the next one."""
    if carries_prompts(config) and config.algorithm.filter_groups.enable:
        found.errors.append(
            f"algorithm.filter_groups.enable=True with {carrying_key(config)}: not supported, because a step would "
            "have to wait for prompts that replace the dropped ones; use one of the two"
        )


def _check_host(config: PPOConfig, found: Findings) -> None:
    host = config.actor_rollout_ref.rollout.server.host
    loopback = host in ("localhost", "::1") or host.startswith("127.")
    if loopback and max(config.trainer.nnodes, config.actor_rollout_ref.rollout.nnodes) > 1:
        found.warnings.append(
            f"{_SERVER}.host={host}: each replica can be reached only from its own node; use an address that other "
            f"nodes can reach, or set {_SERVER}.enable_http=False and {_ROLLOUT}.prometheus.enable=False"
        )


def _check_ports(config: PPOConfig, found: Findings) -> None:
    """Check that the HTTP endpoint of each replica can listen; report the first one that cannot."""
    server, replicas = config.actor_rollout_ref.rollout.server, max(1, replica_count(config))
    field = f"{_SERVER}.port={server.port}"
    for rank in range(replicas if server.port else 1):
        port = server.port + rank if server.port else 0
        if port > _LARGEST_PORT:
            found.errors.append(
                f"{field}: replica {rank} would need port {port}, and ports end at {_LARGEST_PORT}; use at most "
                f"{_LARGEST_PORT + 1 - replicas}"
            )
            return
        error = _bind_error(server.host, port)
        if error is None:
            continue
        if error.errno == errno.EADDRINUSE:
            found.errors.append(
                f"{field}: port {port} on {server.host} is in use (replica {rank}); use another port, or 0 for free "
                "ports"
            )
        else:
            found.errors.append(
                f"{_SERVER}.host={server.host}, port={port}: cannot listen there ({error.strerror or error}); use "
                "host=127.0.0.1, or another port"
            )
        return


def _bind_error(host: str, port: int) -> OSError | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # The server sets this option too: it allows a port whose last connection is still closing.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None


def check_transport(config: PPOConfig, device: str, found: Findings) -> None:
    """Check that the transport of weights works on the device and reaches all replicas, and check `delta=on`."""
    rollout = config.actor_rollout_ref.rollout
    reason = full_update_reason(rollout, device)
    if rollout.checkpoint_engine.delta == "on" and reason is not None:
        found.errors.append(
            f"{_ROLLOUT}.checkpoint_engine.delta=on: every update of this run must be full ({reason}); change that, or "
            "use auto or off"
        )
    backend, usable = resolve_backend(config, device), BACKENDS[device]
    if backend == "naive":
        if rollout.nnodes > 1:
            found.errors.append(
                f"{_BACKEND}=naive: shared memory does not reach replicas on several nodes ({_ROLLOUT}.nnodes="
                f"{rollout.nnodes}); use {usable[0]}"
            )
    elif backend not in usable:
        found.errors.append(
            f"{_BACKEND}={backend}: not supported on trainer.device={device}; use {' or '.join(usable)}"
        )
