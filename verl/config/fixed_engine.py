"""Keys of engines that serve another model than the policy on devices of their own, with weights that do not change."""

# ruff: noqa: RUF009  (key, unsupported and section return dataclass fields)
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from verl.config.conditions import on_accelerator
from verl.config.rollout import MORE_DEVICES_FOR_EXPERTS, expert_parallel
from verl.config.schema import ConfigSection, key, unsupported


@dataclass
class FixedEngineConfig(ConfigSection):
    """The keys that all engines with fixed weights have."""

    name: str = key(
        "vllm", "inference engine", choices=("vllm",), unsupported=("sglang", "trtllm", "hf"), use="use vllm"
    )
    dtype: str | None = key(
        None,
        "dtype of the engine; null: actor_rollout_ref.rollout.dtype; auto: bfloat16 if the device computes it fast, "
        "else float32",
        choices=("auto", "float32", "fp32", "bfloat16", "bf16", None),
        unsupported=("float16", "half", "fp16"),
        use="use auto, float32 or bfloat16",
    )
    tensor_model_parallel_size: int = key(2, "devices that share the weights of one engine", unit="devices", at_least=1)
    gpu_memory_utilization: float = key(
        0.5, "fraction of a device's memory for the engine", above=0, at_most=1, only_with=on_accelerator
    )
    enforce_eager: bool = key(True, "run the engine without graphs and without compilation")
    max_model_len: int | None = key(None, "maximum length of a request", unit="tokens", at_least=1)
    max_num_batched_tokens: int = key(8192, "maximum tokens per step of the engine", unit="tokens", at_least=1)
    max_num_seqs: int = key(1024, "maximum samples that an engine scores at the same time", unit="samples", at_least=1)
    enable_chunked_prefill: bool = key(True, "process long samples in chunks")
    enable_prefix_caching: bool = key(True, "reuse the cache of common prefixes")
    free_cache_engine: bool = key(True, "accepted for compatibility; engines with their own devices keep their memory")
    disable_log_stats: bool = key(True, "log no statistics of the engine")
    engine_kwargs: dict[str, Any] = key({}, "vllm.*: arguments of vLLM's AsyncEngineArgs, which override all others")
    data_parallel_size: int = unsupported(
        1,
        "data parallelism inside an engine",
        f"use 1: the engines are data parallel; {MORE_DEVICES_FOR_EXPERTS}",
    )
    pipeline_model_parallel_size: int = unsupported(1, "pipeline parallelism")
    expert_parallel_size: int = expert_parallel("engine")
