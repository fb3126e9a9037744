import socket

import pytest

from verl.config import load_config
from verl.preflight.checks.rollout import check_transport
from verl.preflight.findings import Findings

ROLLOUT = "actor_rollout_ref__rollout__"
SERVER = ROLLOUT + "server__"
BACKEND = "actor_rollout_ref.rollout.checkpoint_engine.backend"
PARTIAL = ROLLOUT + "partial_rollout"
PARTIAL_ON = {PARTIAL: True, "data__gen_batch_size": 12}


@pytest.fixture
def used_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {ROLLOUT + "log_prob_use_dynamic_bsz": True, ROLLOUT + "log_prob_max_token_len_per_gpu": 8},
            ("rollout.log_prob_max_token_len_per_gpu=8", "at least 32"),
        ),
        ({ROLLOUT + "tensor_model_parallel_size": 2}, ("must divide trainer.n_gpus_per_node=1", "use 1")),
        (
            {ROLLOUT + "nnodes": 1, ROLLOUT + "n_gpus_per_node": 3, ROLLOUT + "tensor_model_parallel_size": 2},
            ("must divide actor_rollout_ref.rollout.n_gpus_per_node=3", "use 1 or 3"),
        ),
    ],
)
def test_sizes_that_do_not_fit_are_errors_with_the_nearest_sizes(problem_of, changes, words):
    text = problem_of(**changes)
    assert all(word in text for word in words), text


def test_separate_processes_need_devices_of_the_replicas_own(problem_of, plan_of):
    separate = {"actor_rollout_ref__hybrid_engine": False}
    text = problem_of(**separate)
    assert text.startswith("actor_rollout_ref.hybrid_engine=False with actor_rollout_ref.rollout.nnodes=0: "), text
    assert "nnodes=1" in text and "hybrid_engine=True" in text
    plan_of(**separate, **{ROLLOUT + "nnodes": 1, ROLLOUT + "n_gpus_per_node": 1})


def test_replicas_divide_the_devices_of_each_node(problem_of):
    changes = {ROLLOUT + "nnodes": 2, ROLLOUT + "n_gpus_per_node": 3, ROLLOUT + "tensor_model_parallel_size": 2}
    problem = problem_of(**changes, **{ROLLOUT + "checkpoint_engine__backend": "gloo"})
    assert "n_gpus_per_node=3" in problem and "use 1 or 3" in problem


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": 3}, "rollout.temperature=3.0: must be at most 2"),
        (
            {"val_kwargs__temperature": 2.5, "val_kwargs__do_sample": True},
            "val_kwargs.temperature=2.5: must be at most 2",
        ),
        ({"max_num_batched_tokens": 16, "max_num_seqs": 64}, "max_num_batched_tokens=16: is less than max_num_seqs=64"),
        ({"load_format": "nonsense"}, "rollout.load_format=nonsense: nonsense is unknown; use one of dummy, auto,"),
        ({"load_format": "dummy_dtensor"}, "use dummy"),
    ],
)
def test_values_that_the_engine_would_refuse_are_errors(problem_of, changes, words):
    assert words in problem_of(**{ROLLOUT + name: value for name, value in changes.items()})


def test_temperatures_that_vllm_would_raise_are_errors(problem_of, plan_of):
    assert "rollout.temperature=0.001: must be at least 0.01" in problem_of(**{ROLLOUT + "temperature": 0.001})
    sampled = {ROLLOUT + "val_kwargs__do_sample": True}
    problem = problem_of(**sampled, **{ROLLOUT + "val_kwargs__temperature": 0.001})
    assert "val_kwargs.temperature=0.001: vLLM would sample at 0.01 instead" in problem
    for temperature in (0.0, 0.01):
        plan_of(**sampled, **{ROLLOUT + "val_kwargs__temperature": temperature})


def test_one_sample_per_prompt_with_grpo_is_a_warning(plan_of):
    (warning,) = plan_of(actor_rollout_ref__rollout__n=1).warnings
    assert "rollout.n=1" in warning and "grpo" in warning
    assert plan_of().warnings == []


# ---- partial rollouts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({PARTIAL: True}, ("data.gen_batch_size is not set", "train_batch_size=8", "at most 16")),
        ({PARTIAL: True, "data__gen_batch_size": 8}, ("gen_batch_size=8", "use 9 to 16")),
        ({PARTIAL: True, "data__gen_batch_size": 17}, ("gen_batch_size=17", "fit into the next step", "use 9 to 16")),
        (
            {**PARTIAL_ON, "algorithm__filter_groups__enable": True, "algorithm__filter_groups__metric": "acc"},
            ("filter_groups.enable=True", "not supported", "one of the two"),
        ),
        ({**PARTIAL_ON, ROLLOUT + "max_staleness": 0}, ("max_staleness=0",)),
    ],
)
def test_invalid_settings_of_partial_rollouts_are_errors(problem_of, changes, words):
    problem = problem_of(**changes)
    assert all(word in problem for word in words), problem


def test_partial_rollouts_without_correction_are_a_warning(plan_of):
    (warning,) = [text for text in plan_of(**PARTIAL_ON).warnings if "partial_rollout" in text]
    assert "rollout_is=token" in warning
    corrected = plan_of(**PARTIAL_ON, algorithm__rollout_correction__rollout_is="token")
    assert not [text for text in corrected.warnings if "partial_rollout" in text]
    bypass = plan_of(**PARTIAL_ON, algorithm__rollout_correction__bypass_mode=True)
    assert not [text for text in bypass.warnings if "partial_rollout" in text]


def test_max_staleness_without_partial_rollouts_is_unused(plan_of):
    notes = "\n".join(plan_of(actor_rollout_ref__rollout__max_staleness=3).notes)
    assert "rollout.partial_rollout=False" in notes and "max_staleness" in notes
    assert "max_staleness" not in "\n".join(plan_of(**PARTIAL_ON, actor_rollout_ref__rollout__max_staleness=3).notes)


# ---- HTTP endpoints -------------------------------------------------------------------------------------------------


def test_metrics_for_prometheus_need_statistics_and_a_free_port(problem_of, plan_of, used_port):
    prometheus = {"actor_rollout_ref__rollout__prometheus__enable": True}
    assert "set disable_log_stats=False" in problem_of(**prometheus)
    prometheus["actor_rollout_ref__rollout__disable_log_stats"] = False
    plan_of(**prometheus)
    assert "is in use" in problem_of(**prometheus, **{SERVER + "port": used_port})


def test_a_port_in_use_is_an_error(problem_of, plan_of, used_port):
    changes = {SERVER + "enable_http": True, SERVER + "port": used_port}
    text = problem_of(**changes)
    assert f"actor_rollout_ref.rollout.server.port={used_port}" in text and "is in use" in text
    plan_of(**(changes | {SERVER + "enable_http": False}))
    plan_of(**(changes | {SERVER + "port": 0}))


def test_the_port_of_each_replica_is_checked(problem_of, used_port):
    text = problem_of(**{SERVER + "enable_http": True, SERVER + "port": used_port - 1, "trainer__n_gpus_per_node": 2})
    assert f"port {used_port} on 127.0.0.1 is in use" in text and "replica 1" in text


def test_a_port_above_the_largest_one_is_an_error(problem_of):
    text = problem_of(**{SERVER + "enable_http": True, SERVER + "port": 65535, "trainer__n_gpus_per_node": 2})
    assert "65536" in text and "at most 65534" in text


def test_a_loopback_address_on_several_nodes_is_a_warning(plan_of, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    several = {SERVER + "enable_http": True, "trainer__nnodes": 2}
    assert any("server.host=127.0.0.1: each replica" in text for text in plan_of(**several).warnings)
    assert not any("server.host" in text for text in plan_of(**several, **{SERVER + "host": "0.0.0.0"}).warnings)
    assert not any("server.host" in text for text in plan_of(**{SERVER + "enable_http": True}).warnings)


def test_an_address_of_another_host_is_an_error(problem_of):
    text = problem_of(**{SERVER + "enable_http": True, SERVER + "host": "203.0.113.7"})
    assert "server.host=203.0.113.7" in text


# ---- transport of weights -------------------------------------------------------------------------------------------


def problems_on(device, run_files, **changes):
    found = Findings()
    check_transport(load_config(run_files.overrides(**changes)), device, found)
    return found.errors


@pytest.mark.parametrize(
    ("device", "backend", "use"),
    [
        ("cpu", "nccl", "use gloo"),
        ("cpu", "hccl", "use gloo"),
        ("cuda", "hccl", "use nccl or gloo"),
    ],
)
def test_a_backend_that_the_device_does_not_support_is_an_error(run_files, device, backend, use):
    [problem] = problems_on(device, run_files, **{ROLLOUT + "checkpoint_engine__backend": backend})
    assert problem == f"{BACKEND}={backend}: not supported on trainer.device={device}; {use}"


@pytest.mark.parametrize(
    ("device", "backend"),
    [("cpu", "gloo"), ("cuda", "nccl"), ("cuda", "gloo"), ("npu", "hccl"), ("npu", "nccl"), ("npu", "gloo")],
)
def test_a_backend_that_the_device_supports_has_no_error(run_files, device, backend):
    assert (
        problems_on(device, run_files, **{ROLLOUT + "checkpoint_engine__backend": backend, ROLLOUT + "nnodes": 2}) == []
    )


def test_shared_memory_reaches_only_one_node(run_files):
    [problem] = problems_on("npu", run_files, **{ROLLOUT + "nnodes": 2})
    assert problem.startswith(f"{BACKEND}=naive: ") and "rollout.nnodes=2" in problem and problem.endswith("use hccl")
    assert problems_on("npu", run_files, **{ROLLOUT + "nnodes": 1}) == []


def test_deltas_that_are_not_possible_are_an_error_if_required(run_files):
    delta = {ROLLOUT + "checkpoint_engine__delta": "on"}
    assert (
        problems_on("npu", run_files, **delta)
        == problems_on("cuda", run_files, **delta, **{ROLLOUT + "free_cache_engine": False})
        == []
    )
    [problem] = problems_on("cuda", run_files, **delta)
    assert (
        "checkpoint_engine.delta=on" in problem
        and "free_cache_engine" in problem
        and problem.endswith("use auto or off")
    )


def test_check_includes_the_transport(problem_of, plan_of):
    assert problem_of(**{ROLLOUT + "checkpoint_engine__backend": "nccl"}).startswith(f"{BACKEND}=nccl: ")
    apart = {ROLLOUT + "nnodes": 2, ROLLOUT + "n_gpus_per_node": 2, ROLLOUT + "checkpoint_engine__backend": "gloo"}
    assert plan_of(**apart).replicas == 4


# ---- arguments of the engine ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "key"),
    [
        ("model: elsewhere", "actor_rollout_ref.model.path"),
        ("tokenizer: elsewhere", "actor_rollout_ref.model.tokenizer_path"),
        ("trust_remote_code: True", "actor_rollout_ref.model.trust_remote_code"),
        ("hf_overrides: {rms_norm_eps: 0.3}", "actor_rollout_ref.model.override_config"),
        ("hf_config_path: elsewhere", "actor_rollout_ref.model.override_config"),
        ("dtype: float16", "actor_rollout_ref.rollout.dtype"),
        ("quantization: fp8", "actor_rollout_ref.rollout.quantization"),
        ("load_format: auto", "actor_rollout_ref.rollout.load_format"),
        ("tensor_parallel_size: 2", "actor_rollout_ref.rollout.tensor_model_parallel_size"),
        ("data_parallel_size: 2", "actor_rollout_ref.rollout.data_parallel_size"),
        ("pipeline_parallel_size: 2", "actor_rollout_ref.rollout.pipeline_model_parallel_size"),
    ],
)
def test_arguments_of_the_engine_that_the_trainer_must_know_are_errors(problem_of, argument, key):
    text = problem_of(**{ROLLOUT + "engine_kwargs": f"{{vllm: {{{argument}}}}}"})
    assert f"engine_kwargs.vllm.{argument.partition(':')[0]}=" in text and text.endswith(f"set {key}"), text


def test_candidates_of_vllm_ascend_in_place_of_tokens_are_an_error(problem_of, plan_of):
    key = ROLLOUT + "engine_kwargs"
    text = problem_of(**{key: "{vllm: {additional_config: {enable_reduce_sample: true}}}"})
    assert "additional_config.enable_reduce_sample=True: vllm-ascend then returns" in text
    plan_of(**{key: "{vllm: {additional_config: {enable_reduce_sample: false}}}"})
