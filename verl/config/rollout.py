"""`actor_rollout_ref.rollout`: vLLM replicas, sampling, agent loops, and weight updates."""

# ruff: noqa: RUF009  (key, unsupported and section return dataclass fields)
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from verl.config import names
from verl.config.conditions import any_of, first_of, micro_batches, on_accelerator, unless, validates, when
from verl.config.profiler import RolloutProfilerConfig
from verl.config.quantization_guard import QuantizationGuardConfig
from verl.config.schema import ConfigSection, key, section, unsupported

# vLLM samples at this temperature if a lower one is given; 0 is greedy decoding.
MIN_TEMPERATURE = 0.01
# vLLM refuses a higher one.
MAX_TEMPERATURE = 2.0
# Largest top_k with sampling masks: the engine returns the log-probabilities of more tokens than that for each token.
MAX_REPLAYED_TOP_K = 1024
_GREEDY = when("do_sample", reason="with greedy validation (val_kwargs.do_sample=False)")
_BETWEEN_NODES = first_of(
    any_of(
        unless("actor_rollout_ref.rollout.nnodes", 0),
        unless("trainer.nnodes", 1),
        reason="with rollout.nnodes=0 and trainer.nnodes=1",
    ),
    unless(
        "run.backend",
        "naive",
        words="a transport other than shared memory",
        reason="with rollout.checkpoint_engine.backend=naive",
    ),
)
_OLD_LOG_PROBS = when(
    "run.correction.bypass_mode", False, reason="in bypass mode, which does not compute old_log_probs"
)
_IN_SAMPLES = micro_batches("log_prob_use_dynamic_bsz", in_tokens=False)
_IN_TOKENS = micro_batches("log_prob_use_dynamic_bsz", in_tokens=True)

MORE_DEVICES_FOR_EXPERTS = (
    "to divide experts among more devices, raise tensor_model_parallel_size and set expert_parallel_size to the same "
    "value"
)


def expert_parallel(one: str) -> Any:
    """Return the field `expert_parallel_size` of a section of engines, each of which is called `one`."""
    return key(
        1,
        f"devices that share the experts of one {one}, each with whole experts; 1: each device has a slice of every "
        "expert; else tensor_model_parallel_size",
        unit="devices",
        at_least=1,
    )


@dataclass
class ValKwargs(ConfigSection):
    """Sampling in validation."""

    n: int = key(1, "samples per validation prompt", unit="samples", at_least=1)
    do_sample: bool = key(False, "sample tokens; False: greedy decoding, which ignores the temperature")
    temperature: float = key(
        0.0, "sampling temperature; 0 or at least 0.01", at_least=0, at_most=MAX_TEMPERATURE, only_with=_GREEDY
    )
    top_p: float = key(1.0, "nucleus sampling", above=0, at_most=1, only_with=_GREEDY)
    top_k: int = key(-1, "sample from this number of the most probable tokens; -1: all", at_least=-1, only_with=_GREEDY)


@dataclass
class CheckpointEngineConfig(ConfigSection):
    """Transfer of new weights from the trainer to the replicas."""

    backend: str = key(
        "naive",
        "transport to replicas on other nodes; naive: shared memory on one node, or with several trainer nodes the "
        "fastest transport of the device; nccl means hccl on an NPU",
        choices=("naive", "nccl", "hccl", "gloo"),
        unsupported=("nixl", "mooncake", "kimi_ckpt_engine", "delta_sharded"),
        use="use nccl, hccl or gloo across nodes",
        only_with=_BETWEEN_NODES,
    )
    timeout: float = key(
        120.0,
        "time limit for sending a bucket to other nodes; the update fails if it is exceeded",
        unit="seconds",
        above=0,
        only_with=_BETWEEN_NODES,
    )
    update_weights_bucket_megabytes: int = key(
        2048, "maximum size of a bucket; a larger tensor gets its own bucket", unit="MiB", at_least=1
    )
    buckets_in_flight: int = key(
        2,
        "buckets in memory at the same time, which are being filled, sent or loaded",
        unit="buckets",
        at_least=2,
    )
    delta: str = key(
        "auto",
        "send only the weights that changed since the last update; auto: while such a delta is much smaller than a "
        "full update; on: always if possible",
        choices=("auto", "on", "off"),
    )
    delta_check_interval: int = key(
        100,
        "compare the engine's weights with a full update after this number of deltas; 0: never",
        unit="updates",
        at_least=0,
        only_with=when(
            "run.full_update_reason",
            None,
            words="weight updates that can be deltas",
            reason="with {run.full_update_reason}",
        ),
    )
    engine_kwargs: dict[str, Any] = unsupported({}, "settings of other transports")


@dataclass
class AgentConfig(ConfigSection):
    """Agent loops, which turn a prompt into a sample."""

    default_agent_loop: str = key(
        "single_turn_agent",
        "agent loop of rows without the column agent_name: single_turn_agent, tool_agent, or your own",
    )
    num_workers: int = key(
        0,
        "processes that run the agent loops and their tools; all samples of a prompt are in the same one; 0: the "
        "driver's process runs all of them, which is enough for loops without tools",
        at_least=0,
    )
    agent_loop_config_path: str | None = key(
        None, "YAML file with a list of your own agent loops: {name, _target_, further keyword arguments}", path=True
    )


@dataclass
class MultiTurnConfig(ConfigSection):
    """Samples with several turns and tools."""

    enable: bool = key(False, "allow several turns in a sample; the agent loop decides their number")
    format: str = key(
        "hermes",
        "format of the model's tool calls; hermes: JSON between <tool_call> and </tool_call>",
        choices=names.TOOL_FORMATS,
        unsupported=names.UNSUPPORTED_TOOL_FORMATS,
        use="use hermes",
    )
    tool_config_path: str | None = key(None, "YAML file of the tools; null: no tools", path=True)
    function_tool_path: str | None = key(
        None, "Python file of functions with the decorator @function_tool, which are tools too; null: none", path=True
    )
    interaction_config_path: str | None = unsupported(None, "simulated users", "use your own agent loop")
    max_assistant_turns: int | None = key(None, "maximum model responses in a sample; null: no limit", at_least=1)
    max_user_turns: int | None = key(None, "maximum rounds of tool responses in a sample; null: no limit", at_least=1)
    max_parallel_calls: int = key(
        1, "maximum tool calls to run from one response of the model; further calls are dropped", at_least=1
    )
    max_tool_response_length: int = key(
        256, "maximum length of a tool response; longer ones are truncated", unit="characters", at_least=1
    )
    tool_response_truncate_side: str = key(
        "middle",
        "part of a long tool response to cut off, as in data.truncation: its beginning (left), end (right) or middle",
        choices=("left", "right", "middle"),
    )


_PROMETHEUS = when("enable")


@dataclass
class ServerConfig(ConfigSection):
    """OpenAI-compatible HTTP endpoint of vLLM for each replica."""

    enable_http: bool = key(False, "serve the endpoint")
    host: str = key("127.0.0.1", "address to listen on; other machines can reach any address except a loopback address")
    port: int = key(0, "port of replica 0; replica r listens on port + r; 0: free ports", at_least=0, at_most=65535)
    api_key: str | None = key(None, "API key that requests must contain; null: a random key")


@dataclass
class PrometheusConfig(ConfigSection):
    """vLLM's metrics for a Prometheus server that the user runs."""

    enable: bool = key(
        False, "serve vLLM's metrics at /metrics of server.host in each replica, and write the addresses into `file`"
    )
    port: int = key(
        9090,
        "port of the Prometheus server on this host, which is asked to read `file` again",
        at_least=1,
        at_most=65535,
        only_with=_PROMETHEUS,
    )
    file: str = key(
        "/tmp/ray/session_latest/metrics/prometheus/prometheus.yml",
        "config file of the Prometheus server; only its job `rollout` is replaced",
        path=True,
        only_with=_PROMETHEUS,
    )
    served_model_name: str | None = key(
        None, "label model_name of the metrics; null: model.path", only_with=_PROMETHEUS
    )


@dataclass
class RolloutConfig(ConfigSection):
    """vLLM replicas, sampling, agent loops, and weight updates."""

    name: str = key(
        "vllm", "inference engine", choices=("vllm",), unsupported=("sglang", "trtllm", "hf"), use="use vllm"
    )
    mode: str = key("async", "the engine is a server", choices=("async",), unsupported=("sync",), use="use async")
    n: int = key(1, "samples per training prompt", unit="samples", at_least=1)
    temperature: float = key(1.0, "sampling temperature in training", at_least=MIN_TEMPERATURE, at_most=MAX_TEMPERATURE)
    top_p: float = key(1.0, "nucleus sampling in training", above=0, at_most=1)
    top_k: int = key(-1, "sample from this number of the most probable tokens; -1: all", at_least=-1)
    val_kwargs: ValKwargs = section(ValKwargs, "sampling in validation", only_with=validates)
    dtype: str = key(
        "auto",
        "dtype of the engine; auto: bfloat16 if the device computes it fast, else float32",
        choices=("auto", "float32", "fp32", "bfloat16", "bf16"),
        unsupported=("float16", "half", "fp16"),
        use="use auto, float32 or bfloat16",
    )
    tensor_model_parallel_size: int = key(
        2, "devices that share the weights of one replica", unit="devices", at_least=1
    )
    nnodes: int = key(
        0,
        "nodes of the replicas, with n_gpus_per_node devices each; 0: the replicas use the trainer's devices",
        at_least=0,
    )
    n_gpus_per_node: int = key(
        8,
        "devices of the replicas on each of their nodes",
        unit="devices",
        at_least=1,
        only_with=unless("nnodes", 0),
    )
    gpu_memory_utilization: float = key(
        0.5, "fraction of a device's memory for the engine", above=0, at_most=1, only_with=on_accelerator
    )
    free_cache_engine: bool = key(
        True,
        "free the engine's device memory during training",
        only_with=(
            on_accelerator,
            when("nnodes", 0, reason="with rollout.nnodes={nnodes}, because the replicas have their own memory"),
        ),
    )
    load_format: str = key(
        "dummy",
        "source of the engine's first weights; dummy: random weights until the first weight update",
        choices=names.LOAD_FORMATS,
        unsupported=("dummy_dtensor", "dummy_hf", "dummy_megatron"),
        use="use dummy",
    )
    max_restarts: int = key(
        3,
        "restarts of each replica whose processes die or no longer respond; the run ends if it dies once more; 0: no "
        "restart",
        at_least=0,
    )
    enforce_eager: bool = key(False, "run the engine without graphs and without compilation")
    cudagraph_capture_sizes: list[int] | None = key(
        None, "batch sizes to capture graphs for; null: vLLM's default", only_with=on_accelerator
    )
    enable_chunked_prefill: bool = key(True, "process long prompts in chunks between decoding steps")
    enable_prefix_caching: bool = key(True, "reuse the keys and values of a prompt for all its samples")
    max_num_batched_tokens: int = key(8192, "maximum tokens per step of the engine", unit="tokens", at_least=1)
    max_num_seqs: int = key(256, "maximum requests that a replica runs at the same time", unit="samples", at_least=1)
    max_model_len: int | None = key(
        None,
        "maximum length of prompt and response together; null: data.max_prompt_length + data.max_response_length",
        unit="tokens",
        at_least=1,
    )
    disable_log_stats: bool = key(True, "log no statistics of the engine")
    logprobs_mode: str = key(
        "processed_logprobs",
        "log-probabilities that the engine returns; processed: of the distribution that it samples from; raw: of the "
        "model's output",
        choices=("processed_logprobs", "raw_logprobs"),
        only_with=when("calculate_log_probs"),
    )
    replay_sampling_mask: bool = key(
        False,
        "with top_p below 1 or top_k above 0: the engine returns the tokens that it could choose from, and the trainer "
        "computes log-probabilities over the same tokens; needs top_k",
    )
    calculate_log_probs: bool = key(
        True, "return log-probabilities of the engine, for the metrics training/rollout_probs_diff_*"
    )
    log_prob_micro_batch_size_per_gpu: int | None = key(
        None,
        "samples per forward pass of a rank for old_log_probs; null: the actor's value",
        unit="samples",
        at_least=1,
        only_with=(_IN_SAMPLES, _OLD_LOG_PROBS),
    )
    log_prob_use_dynamic_bsz: bool | None = key(
        None,
        "fill each micro-batch with samples up to log_prob_max_token_len_per_gpu tokens, instead of "
        "log_prob_micro_batch_size_per_gpu samples; null: the actor's value",
        only_with=_OLD_LOG_PROBS,
    )
    log_prob_max_token_len_per_gpu: int | None = key(
        None,
        "tokens per forward pass of a rank for old_log_probs; null: the actor's value",
        unit="tokens",
        at_least=1,
        only_with=(_IN_TOKENS, _OLD_LOG_PROBS),
    )
    partial_rollout: bool = key(
        False,
        "a training step uses the first data.train_batch_size prompts that are finished; the others are interrupted by "
        "the weight update and continue after it",
    )
    max_staleness: int | None = key(
        None,
        "maximum weight updates between sampling a token and training on it; a step waits for prompts that reach it; "
        "null: 8, or async_training.staleness_threshold rounded up in a fully asynchronous run",
        unit="updates",
        at_least=1,
        only_with=any_of(when("partial_rollout"), when("async_training.enable")),
    )
    checkpoint_engine: CheckpointEngineConfig = section(
        CheckpointEngineConfig, "transfer of new weights from the trainer to the replicas"
    )
    engine_kwargs: dict[str, Any] = key(
        {"vllm": {}},
        "vllm.*: arguments of vLLM's AsyncEngineArgs, which override all other keys; an argument that the trainer must "
        "know too is set by its own key",
    )
    agent: AgentConfig = section(AgentConfig, "agent loops, which turn a prompt into a sample")
    server: ServerConfig = section(
        ServerConfig,
        "OpenAI-compatible HTTP endpoint of each replica",
        only_with=any_of(
            when("actor_rollout_ref.rollout.server.enable_http"), when("actor_rollout_ref.rollout.prometheus.enable")
        ),
    )
    prometheus: PrometheusConfig = section(PrometheusConfig, "metrics of the engines for a Prometheus server")
    multi_turn: MultiTurnConfig = section(
        MultiTurnConfig,
        "samples with several turns and tools",
        only_with=any_of(
            unless("actor_rollout_ref.rollout.agent.default_agent_loop", "single_turn_agent"),
            when("run.rows_choose_loop", words="a column `agent_name` in the data"),
        ),
    )
    quantization: str | None = key(
        None,
        "format of the engine's weights; ascend: MXFP8 or MXFP4 by vllm-ascend, emulated on a CPU; null: the format of "
        "the weights that it receives",
        choices=(*names.QUANTIZATIONS, None),
    )
    quantization_scheme: str | None = key(
        None,
        "ascend: scheme of every quantized layer; W8A8_MXFP8: weights and activations in MXFP8; W4A8_MXFP: weights in "
        "MXFP4, activations in MXFP8, needs vllm-ascend 0.28; null: W8A8_MXFP8, or by layer as in "
        "quantization_config_file",
        choices=(*names.ASCEND_SCHEMES, None),
    )
    quantization_config_file: str | None = key(
        None,
        "ascend: JSON file of layers that stay unquantized, or a description with the scheme of each layer; torchao: "
        "JSON file of its config",
        path=True,
        only_with=unless("quantization", None),
    )
    quantization_side: str = key(
        "sender",
        "process that quantizes new weights (ascend, fp8); sender: each trainer rank quantizes its shard, which sends "
        "fewer bytes; receiver: the engine",
        choices=("sender", "receiver"),
        only_with=unless("quantization", None),
    )
    quantization_self_test: bool | None = key(
        None,
        "ascend: each engine loads known weights into one MXFP8 layer of each kind at its start, and stops if their "
        "bytes, their addresses or a product are wrong; null: on an NPU only",
        only_with=when("quantization", "ascend"),
    )
    quantization_guard: QuantizationGuardConfig = section(
        QuantizationGuardConfig,
        "limit of the mismatch between a quantized rollout and the trainer, and the action if it is exceeded",
        only_with=unless("actor_rollout_ref.rollout.quantization_guard.max_k3_kl", None),
    )
    profiler: RolloutProfilerConfig = section(RolloutProfilerConfig, "device profile of the engines")
    data_parallel_size: int = unsupported(
        1,
        "data parallelism inside a replica",
        f"use 1: the replicas are data parallel; {MORE_DEVICES_FOR_EXPERTS}",
    )
    pipeline_model_parallel_size: int = unsupported(1, "pipeline parallelism")
    expert_parallel_size: int = expert_parallel("replica")
    layered_summon: bool = key(False, "accepted for compatibility; weights are always gathered tensor by tensor")
    enable_sleep_mode: bool = unsupported(
        True,
        "a second switch for free_cache_engine",
        "use free_cache_engine",
        same_if=unless("nnodes", 0, words="replicas on devices of their own (`nnodes`), which never sleep"),
    )
    enable_rollout_routing_replay: bool = unsupported(False, "routing replay")
    ignore_eos: bool = unsupported(False, "responses that continue after the end token")
    do_sample: bool = unsupported(True, "greedy training samples")
    log_prob_micro_batch_size: int | None = unsupported(
        None,
        "a micro-batch size over all ranks",
        "use log_prob_micro_batch_size_per_gpu, which counts samples per rank",
    )

    @property
    def listens(self) -> bool:
        """True if each replica listens at `server.host`."""
        return self.server.enable_http or self.prometheus.enable

    def sequence_limit(self, prompt_length: int, response_length: int) -> int:
        """Return the token limit of a request: `max_model_len`, or the sum of the limits of prompt and response."""
        return self.max_model_len or prompt_length + response_length
