"""From `actor_rollout_ref.rollout.*` to what vLLM's engine is started with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from verl.trainer.config import ModelConfig, RolloutConfig

_GIB = 1 << 30
# vLLM's own block size on a CPU, in tokens: a request's cache is rounded up to it.
_CPU_BLOCK_TOKENS = 128
_WORKER_EXTENSION = "verl.workers.rollout.vllm_rollout.worker_extension.WeightUpdateExtension"


def max_model_len(rollout: RolloutConfig, prompt_length: int, response_length: int) -> int:
    """Tokens a request may have: `rollout.max_model_len`, or prompt and response caps together."""
    return rollout.max_model_len or prompt_length + response_length


def engine_args(
    rollout: RolloutConfig,
    model: ModelConfig,
    *,
    device: str,
    dtype: str,
    prompt_length: int,
    response_length: int,
    seed: int,
) -> dict[str, Any]:
    """Keyword arguments for vLLM's `AsyncEngineArgs`; `rollout.engine_kwargs.vllm` has the last word.

    Args:
        dtype: torch dtype name the engine computes in.
        prompt_length, response_length: caps in tokens.
    """
    length = max_model_len(rollout, prompt_length, response_length)
    arguments: dict[str, Any] = {
        "model": model.path,
        "tokenizer": model.tokenizer_path or model.path,
        "trust_remote_code": model.trust_remote_code,
        "dtype": dtype,
        "load_format": rollout.load_format,
        "tensor_parallel_size": rollout.tensor_model_parallel_size,
        "max_model_len": length,
        "max_num_seqs": rollout.max_num_seqs,
        "max_num_batched_tokens": max(rollout.max_num_batched_tokens, length),
        "enable_chunked_prefill": rollout.enable_chunked_prefill,
        "enable_prefix_caching": rollout.enable_prefix_caching,
        "enforce_eager": rollout.enforce_eager,
        "disable_log_stats": rollout.disable_log_stats,
        "logprobs_mode": rollout.logprobs_mode,
        "seed": seed,
        "worker_extension_cls": _WORKER_EXTENSION,
    }
    if device == "cpu":
        # In-process workers save a process and a hop per step; vLLM allows them for a single worker only.
        arguments["distributed_executor_backend"] = "uni" if rollout.tensor_model_parallel_size == 1 else "mp"
        arguments["kv_cache_memory_bytes"] = cpu_cache_bytes(model.path, dtype, length, rollout.max_num_seqs)
    else:
        arguments["gpu_memory_utilization"] = rollout.gpu_memory_utilization
        arguments["enable_sleep_mode"] = rollout.free_cache_engine
        if rollout.cudagraph_capture_sizes:
            arguments["compilation_config"] = {"cudagraph_capture_sizes": list(rollout.cudagraph_capture_sizes)}
    return arguments | dict(rollout.engine_kwargs.get("vllm") or {})


def cpu_cache_bytes(model_path: str, dtype: str, tokens_per_request: int, max_requests: int) -> int:
    """Key-value cache that holds `max_requests` full requests, between 64 MiB and 4 GiB.

    On a CPU vLLM would reserve a share of the whole machine's memory, which replicas and trainers share.
    """
    config = json.loads((Path(model_path) / "config.json").read_text())
    config = config.get("text_config", config)
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    itemsize = 4 if dtype == "float32" else 2
    blocks = -(-tokens_per_request // _CPU_BLOCK_TOKENS) * max_requests + 1
    wanted = blocks * _CPU_BLOCK_TOKENS * config["num_hidden_layers"] * 2 * kv_heads * head_dim * itemsize
    return min(max(wanted, _GIB // 16), 4 * _GIB)


def engine_environment(*, device: str, threads: int, tensor_parallel_size: int) -> dict[str, str]:
    """Environment variables a replica's process is started with.

    Args:
        threads: CPU cores this replica may use in total.
    """
    environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        environment |= {
            "OMP_NUM_THREADS": str(max(1, threads // tensor_parallel_size)),
            # The trainer uses the same cores while the engine idles: idle threads must sleep, not spin.
            "OMP_WAIT_POLICY": "PASSIVE",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if tensor_parallel_size == 1 else "1",
        }
    return environment
