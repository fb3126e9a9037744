"""Start arguments of an engine."""

import dataclasses
import json

import pytest
from transformers import AutoConfig

from fixtures.tiny import write_tiny_model
from verl.config import CriticConfig, ModelConfig, PPOConfig, RolloutConfig
from verl.config.schema import key_of
from verl.workers.rollout.vllm_rollout import engine_args as engine_args_module
from verl.workers.rollout.vllm_rollout.engine_args import engine_args, engine_environment

# The sides that each key of `actor_rollout_ref.model` must reach, and a value other than the default.
BOTH = {
    "path": "other",
    "tokenizer_path": "tokenizer",
    "trust_remote_code": True,
    "override_config": {"rms_norm_eps": 0.25},
}
# The environment of the engine's processes names these to verl's plugin.
IMPORTED = {"external_lib": ["math"]}
# They change how the trainer computes, or, for LoRA, the weights, which are sent merged, or nothing.
TRAINER = {
    "use_shm": True,
    "use_fused_kernels": False,
    "enable_activation_offload": True,
    "enable_gradient_checkpointing": False,
    "use_remove_padding": False,
    "lora_rank": 8,
    "lora_alpha": 32,
    "lora_adapter_path": "adapter",
    "target_modules": ["q_proj"],
    "exclude_modules": ["k_proj"],
}
ROPE = {"rope_type": "default", "rope_theta": 77.0}


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: str(write_tiny_model(folder / name)) for name in ("model", "other")}


def arguments_of(model, *, engine_kwargs=None, quantization=None, device="cpu"):
    """The engine arguments for a model section, with the default rollout."""
    rollout = RolloutConfig(engine_kwargs={"vllm": engine_kwargs or {}})
    sizes = {"prompt_length": 8, "response_length": 8, "seed": 0}
    return engine_args(rollout, model, device=device, dtype="float32", quantization=quantization, **sizes)


def test_sampling_masks_need_a_limit_of_log_probabilities(model_dirs):
    model, sizes = ModelConfig(path=model_dirs["model"]), {"prompt_length": 8, "response_length": 8, "seed": 0}
    rollout = RolloutConfig(replay_sampling_mask=True, top_k=20)
    assert engine_args(rollout, model, device="cpu", dtype="float32", **sizes)["max_logprobs"] == 46
    assert "max_logprobs" not in arguments_of(model)


def environment_of(model):
    sizes = {"device": "cpu", "threads": 1, "tensor_parallel_size": 1}
    return engine_environment(**sizes, external_lib=model.external_lib)


def test_each_key_of_the_model_reaches_the_sides_that_must_agree(model_dirs):
    plain = ModelConfig(path=model_dirs["model"])
    fields = {field.name: field for field in dataclasses.fields(ModelConfig)}
    refused = {name for name, field in fields.items() if key_of(field).only is not None}
    refused |= {"lora", "fused_kernel_options"}  # sections, which no engine reads
    assert fields.keys() == BOTH.keys() | IMPORTED.keys() | TRAINER.keys() | refused, "where does the new key go?"
    for name, value in (BOTH | IMPORTED | TRAINER).items():
        model = dataclasses.replace(plain, **{name: model_dirs["other"] if name == "path" else value})
        assert (arguments_of(model) != arguments_of(plain)) == (name in BOTH), name
        assert (environment_of(model) != environment_of(plain)) == (name in IMPORTED), name


def test_the_critic_has_no_key_that_an_engine_would_need():
    critic = {field.name for field in dataclasses.fields(CriticConfig().model)}
    assert critic <= {field.name for field in dataclasses.fields(ModelConfig)}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ({"rms_norm_eps": 0.3, "attn_implementation": "eager"}, {"rms_norm_eps": 0.3}),
        ({"attn_implementation": "eager"}, None),
        ({"max_position_embeddings": 512}, None),  # the value of config.json
        ({"rope_parameters": ROPE}, {"rope_parameters": ROPE}),
    ],
)
def test_overridden_fields_reach_the_engine_as_transformers_resolves_them(model_dirs, override, expected):
    model = ModelConfig(path=model_dirs["model"], override_config=override)
    overrides = arguments_of(model).get("hf_overrides")
    assert overrides == expected
    trainer = AutoConfig.from_pretrained(model.path, **override)
    assert all(getattr(trainer, name) == value for name, value in (overrides or {}).items())


def test_overridden_fields_and_the_quantization_share_the_overrides(model_dirs):
    model = ModelConfig(path=model_dirs["model"], override_config={"rms_norm_eps": 0.3})
    quantization = {"quantization": "fp8", "hf_overrides": {"quantization_config": {"quant_method": "fp8"}}}
    overrides = arguments_of(model, quantization=quantization)["hf_overrides"]
    assert overrides == {"rms_norm_eps": 0.3, "quantization_config": {"quant_method": "fp8"}}
    with pytest.raises(ValueError, match=r"hf_overrides\.rms_norm_eps=0\.5: .*override_config"):
        arguments_of(model, engine_kwargs={"hf_overrides": {"rms_norm_eps": 0.5}})


def test_an_unknown_field_is_an_error_of_the_engine_too(model_dirs):
    with pytest.raises(ValueError, match="override_config: unknown key rms_eps"):
        arguments_of(ModelConfig(path=model_dirs["model"], override_config={"rms_eps": 0.3}))


@pytest.mark.parametrize("device", ["cuda", "npu"])
@pytest.mark.parametrize(("size", "executor"), [(1, "uni"), (4, "mp")])
def test_ray_never_runs_the_workers(device, size, executor):
    """vLLM would choose Ray in the trainer's placement group, and wait there for devices that the trainer has."""
    roles = PPOConfig().actor_rollout_ref
    roles.rollout.tensor_model_parallel_size, roles.model.path = size, "model"
    caps = {"prompt_length": 8, "response_length": 8, "seed": 0}
    arguments = engine_args(roles.rollout, roles.model, device=device, dtype="bfloat16", **caps)
    assert (arguments["tensor_parallel_size"], arguments["distributed_executor_backend"]) == (size, executor)
    roles.rollout.engine_kwargs = {"vllm": {"distributed_executor_backend": "external_launcher"}}
    arguments = engine_args(roles.rollout, roles.model, device=device, dtype="bfloat16", **caps)
    assert arguments["distributed_executor_backend"] == "external_launcher"


@pytest.mark.parametrize("size", [1, 4])
def test_devices_share_experts_only_on_request(model_dirs, size):
    rollout = RolloutConfig(tensor_model_parallel_size=4, expert_parallel_size=size)
    sizes = {"prompt_length": 8, "response_length": 8, "seed": 0}
    arguments = engine_args(rollout, ModelConfig(path=model_dirs["model"]), device="cpu", dtype="float32", **sizes)
    assert arguments["enable_expert_parallel"] is (size > 1)


def test_only_the_end_ids_of_the_generation_config_act(tmp_path):
    """Its sampling parameters would silently change the samples of requests that do not set them."""
    from vllm import AsyncEngineArgs

    path = write_tiny_model(tmp_path)
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], "max_new_tokens": 7, **sampling}))
    model = AsyncEngineArgs(**arguments_of(ModelConfig(path=str(path)))).create_model_config()
    assert model.get_diff_sampling_param() == {}
    assert model.try_get_generation_config()["eos_token_id"] == [2, 5]


@pytest.mark.parametrize(
    ("release", "expected"),
    [(None, None), ("0.18.0", {}), ("0.23.0", {"weight_nz_mode": 0}), ("0.30.0rc2", {"weight_nz_mode": 0})],
)
def test_engine_on_an_npu_gets_the_switch_that_its_release_reads(model_dirs, monkeypatch, release, expected):
    monkeypatch.setattr(engine_args_module, "installed_vllm_ascend", lambda: release)
    model = ModelConfig(path=model_dirs["model"])
    arguments = arguments_of(model, device="npu")
    assert arguments.get("additional_config") == expected
    given = {"additional_config": {"enable_cpu_binding": False}}
    arguments = arguments_of(model, device="npu", engine_kwargs=given)
    assert arguments["additional_config"] == {**given["additional_config"], **(expected or {})}
    assert "additional_config" not in arguments_of(model, device="cuda")


def test_only_models_with_latent_attention_get_the_rl_config(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_args_module, "installed_vllm_ascend", lambda: "0.30.0rc2")
    directory = write_tiny_model(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "kv_lora_rank": 64}))
    arguments = arguments_of(ModelConfig(path=str(directory)), device="npu")
    assert arguments["additional_config"] == {"weight_nz_mode": 0, "rl_config": {"enabled": True}}


def test_nested_settings_of_the_user_are_merged_into_those_of_other_keys(model_dirs):
    def compilation(given):
        rollout = RolloutConfig(
            cudagraph_capture_sizes=[8, 16], engine_kwargs={"vllm": {"compilation_config": given} if given else {}}
        )
        sizes = {"prompt_length": 8, "response_length": 8, "seed": 0}
        model = ModelConfig(path=model_dirs["model"])
        return engine_args(rollout, model, device="cuda", dtype="float32", **sizes)["compilation_config"]

    mode = {"cudagraph_mode": "FULL_DECODE_ONLY"}
    assert compilation(mode) == {"cudagraph_capture_sizes": [8, 16]} | mode
    assert compilation({"cudagraph_capture_sizes": [4]}) == {"cudagraph_capture_sizes": [4]}
    assert compilation({}) == {"cudagraph_capture_sizes": [8, 16]}
    with pytest.raises(ValueError, match="replaces the settings cudagraph_capture_sizes of other keys"):
        compilation(3)
