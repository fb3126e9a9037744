"""The vLLM of the release has everything that the server uses: fields, methods, arguments, names."""

import dataclasses
import inspect
from dataclasses import replace

import pytest
from contract.vllm_ascend.harness import RELEASE  # noqa: F401  (registers what the release registers)
from vllm import AsyncEngineArgs, EngineArgs, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from fixtures.tiny import write_tiny_model
from verl.config import ModelConfig, RolloutConfig
from verl.utils.quantization.ascend_description import build_description
from verl.utils.vllm.server import build_openai_app, openai_functions
from verl.workers.rollout.vllm_rollout.engine_args import engine_args

pytestmark = pytest.mark.feature("server")


@pytest.mark.parametrize("device", ["npu", "cpu"])
def test_every_engine_argument_exists(tmp_path, device):
    directory = write_tiny_model(tmp_path)
    description = build_description(directory).to_json_dict()
    rollout = replace(RolloutConfig(), quantization="ascend", cudagraph_capture_sizes=[1, 2])
    arguments = engine_args(
        rollout,
        ModelConfig(path=str(directory)),
        device=device,
        dtype="bfloat16",
        prompt_length=16,
        response_length=16,
        seed=0,
        quantization={"quantization": "ascend", "hf_overrides": {"quantization_config": description}},
    )
    assert arguments.keys() <= {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    AsyncEngineArgs(**arguments)


CALLS = {
    "from_vllm_config": (["config"], {"disable_log_stats": True}),
    "generate": (["self", "prompt", "parameters", "id"], {}),
    "pause_generation": (["self"], {"mode": "wait", "clear_cache": False}),
    "resume_generation": (["self"], {}),
    "reset_prefix_cache": (["self"], {}),
    "collective_rpc": (["self", "verl_begin_update"], {"args": (1,)}),
    "check_health": (["self"], {}),
    "sleep": (["self"], {"level": 1}),
    "wake_up": (["self"], {"tags": ["weights"]}),
    "shutdown": (["self"], {}),
    "get_supported_tasks": (["self"], {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_engine_method_accepts_the_arguments(name):
    positional, named = CALLS[name]
    inspect.signature(getattr(AsyncLLM, name)).bind(*positional, **named)
    coroutine = inspect.iscoroutinefunction(getattr(AsyncLLM, name))
    stream = inspect.isasyncgenfunction(getattr(AsyncLLM, name))
    assert coroutine == (name not in ("from_vllm_config", "generate", "shutdown")) and stream == (name == "generate")


def test_resetting_the_prefix_cache_returns_success():
    assert inspect.signature(AsyncLLM.reset_prefix_cache).return_annotation in (bool, "bool")


def test_imported_names_exist():
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.exceptions import EngineDeadError

    assert TokensPrompt(prompt_token_ids=[1]) == {"prompt_token_ids": [1]} or TokensPrompt(prompt_token_ids=[1])
    assert issubclass(EngineDeadError, Exception)
    parameters = SamplingParams(
        temperature=1.0, top_p=0.9, top_k=-1, max_tokens=4, logprobs=0, ignore_eos=True, seed=1, detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip
    assert parameters.output_kind is RequestOutputKind.FINAL_ONLY
    with pytest.raises(TypeError):
        SamplingParams(no_such_parameter=1)


# Routes that vLLM adds with VLLM_SERVER_DEV_MODE, which vllm-ascend sets with `rl_config`.
DEVELOPMENT_ROUTES = {
    f"/{name}"
    for name in (
        "abort_requests", "collective_rpc", "finish_weight_update", "init_weight_transfer_engine", "is_paused",
        "is_sleeping", "pause", "reset_encoder_cache", "reset_mm_cache", "reset_prefix_cache", "resume", "server_info",
        "sleep", "start_weight_update", "update_weight_version", "update_weights", "wake_up", "weight_info",
    )
}  # fmt: skip


def test_http_endpoint_requires_the_key(tmp_path, monkeypatch):
    """The application of the release's vLLM, without an engine behind it."""
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    directory = str(write_tiny_model(tmp_path))
    config = EngineArgs(model=directory).create_model_config()
    app, arguments = build_openai_app(directory, ("generate",), config, api_key="secret")
    paths = {getattr(route, "path", "") for route in app.routes}
    assert {"/v1/chat/completions", "/v1/completions", "/health"} <= paths
    _, init_app_state, _ = openai_functions()
    assert inspect.iscoroutinefunction(init_app_state)
    inspect.signature(init_app_state).bind("engine", app.state, arguments, ("generate",))

    from fastapi.testclient import TestClient

    assert not paths & DEVELOPMENT_ROUTES
    client = TestClient(app)
    assert client.get("/v1/models").status_code == 401
    assert client.get("/v1/models", headers={"Authorization": "Bearer other"}).status_code == 401
