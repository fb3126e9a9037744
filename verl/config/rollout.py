"""`actor_rollout_ref.rollout`: the vLLM replicas, sampling, and how new weights reach them."""

# ruff: noqa: RUF009  (key, planned and section make dataclass fields)
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from verl.config import names
from verl.config.schema import key, planned, section


@dataclass
class ValKwargs:
    """Sampling in validation."""

    n: int = key(1, "samples of each validation prompt", unit="samples", at_least=1)
    do_sample: bool = key(False, "sample; otherwise the likeliest token is taken, whatever the temperature")
    temperature: float = key(0.0, "sampling temperature where do_sample is True", at_least=0)
    top_p: float = key(1.0, "nucleus sampling where do_sample is True", above=0, at_most=1)
    top_k: int = key(-1, "likeliest tokens to sample from, -1 for all", at_least=-1)


@dataclass
class CheckpointEngineConfig:
    """How new weights travel from the trainer to the replicas."""

    backend: str = key(
        "naive",
        "transport to replicas on other nodes; naive: none, shared memory on the trainer's node alone, and with "
        "trainer.nnodes above 1 the fastest that the device has; on an NPU nccl means hccl",
        choices=("naive", "nccl", "hccl", "gloo"),
        planned=("nixl", "mooncake", "kimi_ckpt_engine", "delta_sharded"),
        use="use nccl, hccl or gloo across nodes",
    )
    timeout: float = key(
        120.0, "time that a bucket may take to other nodes, after which the update fails", unit="seconds", above=0
    )
    update_weights_bucket_megabytes: int = key(
        2048, "size of a bucket, at most; a larger tensor gets its own", unit="MiB", at_least=1
    )
    buckets_in_flight: int = key(
        2, "buckets in memory at a time: filled, waiting or being loaded", unit="buckets", at_least=2
    )
    delta: str = key(
        "auto",
        "send only what changed since the last update; auto: where trainer and engine know it and it is little enough "
        "to pay; on: however much it is",
        choices=("auto", "on", "off"),
    )
    delta_check_interval: int = key(
        100,
        "after so many updates of changes alone, compare the engine with a whole update; 0 for never",
        unit="updates",
        at_least=0,
    )
    engine_kwargs: dict[str, Any] = planned({}, "settings of other transports")


@dataclass
class AgentConfig:
    """Who turns a prompt into a sample."""

    default_agent_loop: str = key(
        "single_turn_agent",
        "agent loop of rows without the column agent_name: single_turn_agent, tool_agent, or one of your own",
    )
    num_workers: int = planned(0, "agent loops in processes of their own", "use 0: they run in the driver's process")
    agent_loop_config_path: str | None = key(
        None, "YAML list of agent loops of your own: {name, _target_, further keywords}", path=True
    )


@dataclass
class MultiTurnConfig:
    """Several turns and tools."""

    enable: bool = key(False, "samples may have several turns; the agent loop decides whether they do")
    format: str = key(
        "hermes",
        "how the model writes tool calls; hermes: JSON between <tool_call> and </tool_call>",
        choices=tuple(names.TOOL_FORMATS),
        planned=tuple(names.UNSUPPORTED_TOOL_FORMATS),
        use="use hermes",
    )
    tool_config_path: str | None = key(None, "YAML file of the tools, null for none", path=True)
    interaction_config_path: str | None = planned(None, "simulated users", "use an agent loop of your own")
    max_assistant_turns: int | None = key(None, "answers of the model in a sample, null for any", at_least=1)
    max_user_turns: int | None = key(None, "rounds of tool responses in a sample, null for any", at_least=1)
    max_parallel_calls: int = key(1, "tool calls of one answer that are run; the rest are dropped", at_least=1)
    max_tool_response_length: int = key(256, "longer tool responses are truncated", unit="characters", at_least=1)
    tool_response_truncate_side: str = key(
        "middle",
        "left keeps the beginning of a long response, right the end, middle half of each",
        choices=("left", "right", "middle"),
    )


@dataclass
class ServerConfig:
    """vLLM's OpenAI-compatible HTTP endpoint in front of each replica."""

    enable_http: bool = key(False, "serve it")
    host: str = key("127.0.0.1", "address to listen on; other machines can reach it unless it is loopback")
    port: int = key(0, "port of replica 0, replica r takes port + r; 0 for free ones", at_least=0, at_most=65535)
    api_key: str | None = key(None, "key that requests must carry, null for a random one")


@dataclass
class RolloutConfig:
    """The vLLM replicas, sampling, and how new weights reach them."""

    name: str = key("vllm", "inference engine", choices=("vllm",), planned=("sglang", "trtllm", "hf"), use="use vllm")
    mode: str = key("async", "the engine is a server", choices=("async",), planned=("sync",), use="use async")
    n: int = key(1, "samples of each training prompt", unit="samples", at_least=1)
    temperature: float = key(1.0, "sampling temperature in training", above=0)
    top_p: float = key(1.0, "nucleus sampling", above=0, at_most=1)
    top_k: int = key(-1, "likeliest tokens to sample from, -1 for all", at_least=-1)
    val_kwargs: ValKwargs = section(ValKwargs, "sampling in validation")
    dtype: str = key(
        "auto",
        "dtype of the engine; auto: bfloat16 where the device is fast in it, else float32",
        choices=("auto", "float32", "fp32", "bfloat16", "bf16"),
        planned=("float16", "half", "fp16"),
        use="use auto, float32 or bfloat16",
    )
    tensor_model_parallel_size: int = key(2, "devices that share one replica's weights", unit="devices", at_least=1)
    nnodes: int = key(
        0,
        "0: replicas share the trainer's devices; else they have n_gpus_per_node of their own on each of so many nodes",
        at_least=0,
    )
    n_gpus_per_node: int = key(
        8, "devices of a node that are the replicas', where nnodes is not 0", unit="devices", at_least=1
    )
    gpu_memory_utilization: float = key(0.5, "share of a device's memory for the engine", above=0, at_most=1)
    free_cache_engine: bool = key(True, "the engine gives its device memory to the trainer while it trains")
    load_format: str = key("dummy", "what the engine starts with; dummy: random, until the first weight update")
    enforce_eager: bool = key(False, "no graphs and no compilation in the engine")
    cudagraph_capture_sizes: list[int] | None = key(None, "batch sizes that graphs are captured for, null for vLLM's")
    enable_chunked_prefill: bool = key(True, "long prompts are read in pieces between decoding steps")
    enable_prefix_caching: bool = key(True, "samples of one prompt share its keys and values")
    max_num_batched_tokens: int = key(8192, "tokens the engine computes at once", unit="tokens", at_least=1)
    max_num_seqs: int = key(256, "requests a replica runs at once", unit="samples", at_least=1)
    max_model_len: int | None = key(
        None, "longest prompt and response together, null for the two caps of data", unit="tokens", at_least=1
    )
    disable_log_stats: bool = key(True, "no statistics from the engine")
    logprobs_mode: str = key(
        "processed_logprobs",
        "which log-probabilities the engine returns; processed: of the distribution sampled from",
        choices=("processed_logprobs", "raw_logprobs"),
    )
    calculate_log_probs: bool = key(True, "return the engine's log-probabilities, for training/rollout_probs_diff_*")
    log_prob_micro_batch_size_per_gpu: int | None = key(
        None, "samples a rank runs forward at once for old_log_probs, null for the actor's", unit="samples", at_least=1
    )
    log_prob_use_dynamic_bsz: bool | None = key(
        None, "fill micro-batches up to log_prob_max_token_len_per_gpu instead, null as the actor"
    )
    log_prob_max_token_len_per_gpu: int | None = key(
        None, "tokens a rank runs forward at once for old_log_probs, null for the actor's", unit="tokens", at_least=1
    )
    partial_rollout: bool = key(
        False,
        "a step takes the first data.train_batch_size prompts that are done; updates cut the others, which go on",
    )
    max_staleness: int = key(
        8,
        "updates between an answer's oldest token and its step with partial_rollout; older ones are waited for",
        unit="updates",
        at_least=1,
    )
    checkpoint_engine: CheckpointEngineConfig = section(CheckpointEngineConfig, "how new weights reach the replicas")
    engine_kwargs: dict[str, Any] = key(
        {"vllm": {}}, "vllm.*: arguments of vLLM's AsyncEngineArgs, which have the last word"
    )
    agent: AgentConfig = section(AgentConfig, "who turns a prompt into a sample")
    server: ServerConfig = section(ServerConfig, "an OpenAI-compatible HTTP endpoint on each replica")
    multi_turn: MultiTurnConfig = section(MultiTurnConfig, "several turns and tools")
    quantization: str | None = key(
        None,
        "how the engine holds its weights; ascend: MXFP8 by vllm-ascend, emulated on a CPU; null: as they are sent",
        choices=(*names.QUANTIZATIONS, None),
    )
    quantization_config_file: str | None = key(
        None,
        "ascend: JSON with layers to leave out, or a ModelSlim description; torchao: the JSON of its config",
        path=True,
    )
    quantization_side: str = key(
        "sender",
        "where ascend and fp8 quantize new weights; sender: each trainer rank its shard, so that fewer bytes travel",
        choices=("sender", "receiver"),
    )
    data_parallel_size: int = planned(1, "data parallelism inside a replica", "use 1: replicas are data parallel")
    pipeline_model_parallel_size: int = planned(1, "pipeline parallelism")
    expert_parallel_size: int = planned(1, "expert parallelism")
    layered_summon: bool = key(False, "weights are gathered tensor by tensor, which both values mean")
    enable_sleep_mode: bool = planned(True, "a second switch for free_cache_engine", "use free_cache_engine")
    enable_rollout_routing_replay: bool = planned(False, "routing replay")
    ignore_eos: bool = planned(False, "answers beyond the end token")
    do_sample: bool = planned(True, "greedy training samples")
    log_prob_micro_batch_size: int | None = planned(
        None, "a micro-batch size over all ranks", "use log_prob_micro_batch_size_per_gpu, samples per rank"
    )
