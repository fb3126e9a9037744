"""Engine arguments and environment of vLLM, derived from `actor_rollout_ref.rollout.*`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from verl.config import ModelConfig, RolloutConfig
from verl.extension.external import environment_of
from verl.utils.dtypes import itemsize_of
from verl.utils.hf_config import overridden_fields
from verl.utils.host import cpu_environment
from verl.utils.model_dir.kv_cache import cpu_kv_cache_bytes
from verl.utils.model_dir.model_files import read_model, with_overrides
from verl.utils.quantization.ascend_releases import installed_vllm_ascend
from verl.utils.sampling_masks import candidates_for_top_k
from verl.utils.vllm.npu_settings import npu_additional_config, npu_environment

_WORKER_EXTENSION = "verl.workers.rollout.vllm_rollout.worker_extension.WeightUpdateExtension"


def engine_args(
    rollout: RolloutConfig,
    model: ModelConfig,
    *,
    device: str,
    dtype: str,
    prompt_length: int,
    response_length: int,
    seed: int,
    quantization: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return keyword arguments for vLLM's `AsyncEngineArgs`; `rollout.engine_kwargs.vllm` overrides them.

    Args:
        dtype: name of the torch dtype in which the engine computes.
        prompt_length, response_length: limits in tokens.
        quantization: arguments that the quantization needs; single entries of its dictionaries can be overridden.

    Raises:
        ValueError: `engine_kwargs.vllm` overrides the quantization, `model.override_config` or a setting that an NPU
            needs, or the model's config lacks a field of `override_config`.
    """
    assert model.path is not None, "preflight checks that it is set"
    length = rollout.sequence_limit(prompt_length, response_length)
    arguments: dict[str, Any] = {
        "model": model.path,
        "tokenizer": model.tokenizer_path or model.path,
        "trust_remote_code": model.trust_remote_code,
        "dtype": dtype,
        "load_format": rollout.load_format,
        "tensor_parallel_size": rollout.tensor_model_parallel_size,
        "enable_expert_parallel": rollout.expert_parallel_size > 1,
        "max_model_len": length,
        "max_num_seqs": rollout.max_num_seqs,
        "max_num_batched_tokens": max(rollout.max_num_batched_tokens, length),
        "enable_chunked_prefill": rollout.enable_chunked_prefill,
        "enable_prefix_caching": rollout.enable_prefix_caching,
        "enforce_eager": rollout.enforce_eager,
        "disable_log_stats": rollout.disable_log_stats,
        "logprobs_mode": rollout.logprobs_mode,
        "seed": seed,
        # Requests over HTTP start from vLLM's neutral sampling parameters, not from those of the model's
        # generation_config.json. Its end-of-sequence ids act in both cases.
        "generation_config": "vllm",
        "worker_extension_cls": _WORKER_EXTENSION,
        # An in-process worker saves a process and a hop per step; vLLM allows it for a single worker only. By default
        # vLLM would use Ray for several, and wait forever for the devices that the trainer's ranks reserve.
        "distributed_executor_backend": "uni" if rollout.tensor_model_parallel_size == 1 else "mp",
    }
    if rollout.prometheus.enable and rollout.prometheus.served_model_name is not None:
        arguments["served_model_name"] = rollout.prometheus.served_model_name
    if rollout.replay_sampling_mask:
        arguments["max_logprobs"] = candidates_for_top_k(rollout.top_k)
    if device == "cpu":
        # By default vLLM would reserve a share of the machine's memory, which replicas and trainers share.
        arguments["kv_cache_memory_bytes"] = cpu_kv_cache_bytes(
            with_overrides(read_model(model.path), model.override_config),
            itemsize_of(dtype),
            length,
            rollout.max_num_seqs,
        )
    else:
        arguments["gpu_memory_utilization"] = rollout.gpu_memory_utilization
        arguments["enable_sleep_mode"] = rollout.free_cache_engine
        if rollout.cudagraph_capture_sizes:
            arguments["compilation_config"] = {"cudagraph_capture_sizes": list(rollout.cudagraph_capture_sizes)}
    needed = dict(quantization or {})
    fields = overridden_fields(model.path, model.trust_remote_code, model.override_config)
    if fields:
        needed["hf_overrides"] = {**fields, **needed.get("hf_overrides", {})}
    merged = _merged(arguments, needed, rollout.engine_kwargs.get("vllm") or {})
    if device == "npu" and (release := installed_vllm_ascend()) is not None:
        latent = read_model(model.path).number("kv_lora_rank") is not None
        merged["additional_config"] = npu_additional_config(
            release, merged.get("additional_config"), latent_attention=latent
        )
    return merged


def _merged(arguments: dict[str, Any], required: Mapping[str, Any], user: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**arguments, **required, **user}
    for key, value in arguments.items():
        given = user.get(key)
        if isinstance(value, Mapping) and isinstance(given, Mapping):
            merged[key] = {**value, **given}
        elif isinstance(value, Mapping) and given is not None:
            raise ValueError(
                f"actor_rollout_ref.rollout.engine_kwargs.vllm.{key}={given!r}: replaces the settings "
                f"{', '.join(value)} of other keys; give a mapping, or leave these keys out"
            )
    for key, needed in required.items():
        given = user.get(key)
        if given is None or given == needed:
            merged[key] = needed
        elif isinstance(needed, Mapping) and isinstance(given, Mapping):
            clash = next((name for name in needed if name in given and given[name] != needed[name]), None)
            if clash is not None:
                raise ValueError(
                    f"actor_rollout_ref.rollout.engine_kwargs.vllm.{key}.{clash}={given[clash]!r}: "
                    "actor_rollout_ref.model.override_config or .rollout.quantization sets it; remove one of the two"
                )
            merged[key] = {**needed, **given}
        else:
            raise ValueError(
                f"actor_rollout_ref.rollout.engine_kwargs.vllm.{key}={given!r}: actor_rollout_ref.rollout.quantization "
                f"sets it to {needed!r}; remove one of the two"
            )
    return merged


def engine_environment(
    *, device: str, threads: int, tensor_parallel_size: int, external_lib: Sequence[str] | None = None
) -> dict[str, str]:
    """Return the environment variables of a replica's process.

    Args:
        threads: CPU cores for this replica in total.
        external_lib: `model.external_lib`, which the engine's processes import too.
    """
    environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "TOKENIZERS_PARALLELISM": "false"}
    environment |= environment_of(external_lib or ())
    if device == "cpu":
        environment |= {
            **cpu_environment(max(1, threads // tensor_parallel_size)),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if tensor_parallel_size == 1 else "1",
        }
    elif device == "npu":
        environment |= npu_environment(os.environ, installed_vllm_ascend())
    return environment
