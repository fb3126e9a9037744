"""Replicas of models with fixed weights: the teacher of distillation, and the reward model."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from verl.config import ModelConfig, RolloutConfig
from verl.config.engine_pools import EnginePool
from verl.single_controller.placement import RayOptions
from verl.timeline.spans import current_timeline
from verl.utils.dtypes import choose_dtype
from verl.utils.heartbeat import heartbeat_environment
from verl.utils.host import cpu_cores
from verl.utils.model_dir.model_files import read_model
from verl.utils.model_dir.model_kind import model_kind
from verl.workers.rollout.replica import ReplicaSet, vLLMReplica
from verl.workers.rollout.vllm_rollout.engine_args import engine_environment

logger = logging.getLogger(__name__)

_CLASSIFIER_ARGUMENTS = {"runner": "pooling", "convert": "classify"}


def fixed_replicas(pool: EnginePool, options: Sequence[RayOptions], device: str) -> ReplicaSet:
    """Return the replicas of a pool, which keep the weights and the memory that they start with.

    Args:
        options: Ray options by engine.
        device: `cpu`, `cuda` or `npu`.
    """
    assert pool.path is not None, "preflight checks that it is set"
    dtype = choose_dtype(device, pool.dtype).name
    names = {field.name for field in dataclasses.fields(RolloutConfig)}
    given = {name: value for name, value in pool.engine.items() if name in names}
    classifies = model_kind(read_model(pool.path).whole_config) == "classifier"
    own = {**(_CLASSIFIER_ARGUMENTS if classifies else {}), **(pool.engine.engine_kwargs.get("vllm") or {})}
    fixed = {"dtype": dtype, "load_format": "auto", "free_cache_engine": False, "engine_kwargs": {"vllm": own}}
    arguments = {
        "rollout": RolloutConfig(**given | fixed),
        "model": ModelConfig(path=pool.path),
        "device": device,
        "dtype": dtype,
        "prompt_length": pool.prompt_length,
        "response_length": pool.response_length,
        "timeline": current_timeline(),
    }
    environment = engine_environment(
        device=device,
        threads=max(1, cpu_cores() * max(1, pool.nodes) // max(1, len(options))),
        tensor_parallel_size=pool.engine.tensor_model_parallel_size,
    )
    return ReplicaSet(
        [
            vLLMReplica(rank, arguments, option, environment | heartbeat_environment(f"{pool.model} engine {rank}"))
            for rank, option in enumerate(options)
        ],
        on_start=lambda rank, report: logger.info(
            "%s engine %d is up after %.1f s (pid %d)", pool.model, rank, report["seconds"], report["pid"]
        ),
    )
