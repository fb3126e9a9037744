"""Checks that the engines of every model beside the policy share: devices, model, arguments and memory."""

from __future__ import annotations

from verl.config.engine_pools import EnginePool
from verl.preflight.checks.expert_parallel import check_expert_parallel
from verl.preflight.checks.model import find_model
from verl.preflight.findings import Findings
from verl.preflight.target import Target
from verl.utils.dtypes import choose_dtype, itemsize_of
from verl.utils.model_dir.model_files import ModelFiles


def check_pool(pool: EnginePool, target: Target, found: Findings) -> ModelFiles | None:
    """Check devices and arguments of the engines; return the files of the model, None if missing or damaged."""
    size = pool.engine.tensor_model_parallel_size
    if not pool.nodes:
        found.errors.append(
            f"{pool.section}.nnodes=0 with {pool.switch}=True: the {pool.model} needs devices of its own; set the "
            "number of its nodes"
        )
    if pool.devices_per_node % size:
        found.errors.append(
            f"{pool.engine_section}.tensor_model_parallel_size={size}: does not divide {pool.section}.n_gpus_per_node="
            f"{pool.devices_per_node}; use a divisor"
        )
    if others := sorted(set(pool.engine.engine_kwargs) - {"vllm"}):
        found.errors.append(f"{pool.engine_section}.engine_kwargs: has {', '.join(others)}; only vllm is supported")
    if pool.path is None:
        found.errors.append(
            f"{pool.path_key} is not set: set it to the {pool.model}'s directory, or {pool.switch}=False"
        )
        return None
    files = find_model(pool.path_key, pool.path, target, found)
    if files is not None:
        check_expert_parallel(pool.engine_section, pool.engine, files, found)
        _check_device_memory(pool, files, target, found)
    return files


def _check_device_memory(pool: EnginePool, files: ModelFiles, target: Target, found: Findings) -> None:
    """Check that the weights fit into the engine's part of a planned device."""
    hardware, engine = target.hardware, pool.engine
    if hardware is None or hardware.memory_bytes is None or files.parameters is None:
        return
    itemsize = itemsize_of(choose_dtype(hardware.device, pool.dtype).name)
    weights = files.parameters * itemsize / engine.tensor_model_parallel_size
    share = engine.gpu_memory_utilization * hardware.memory_bytes
    if weights > share:
        found.errors.append(
            f"{pool.engine_section}: the {pool.model}'s weights take {weights / 1e9:.1f} GB on each device, but "
            f"gpu_memory_utilization={engine.gpu_memory_utilization:g} leaves {share / 1e9:.1f} GB; raise "
            "tensor_model_parallel_size or gpu_memory_utilization"
        )
