"""Requirements and vLLM arguments of `rollout.quantization=fp8`."""

import pytest
import torch

from fixtures.tiny import write_tiny_model


def test_engine_arguments(wide, make):
    config = make("fp8", wide).engine_overrides("cuda")["hf_overrides"]["quantization_config"]
    assert (config["quant_method"], config["weight_block_size"]) == ("fp8", [128, 128])
    assert config["ignored_layers"] == []


def test_routers_are_ignored_layers(tmp_path, make):
    over = dict(hidden_size=128, moe_intermediate_size=128, num_key_value_heads=4)
    directory = write_tiny_model(tmp_path, kind="qwen3_moe", **over)
    config = make("fp8", directory).engine_overrides("cuda")["hf_overrides"]["quantization_config"]
    assert config["ignored_layers"] == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]


@pytest.mark.parametrize(
    ("device", "over", "message"),
    [
        ("npu", {}, "not on npu; use ascend"),
        ("cuda", {"tensor_model_parallel_size": 4}, r"(down|o)_proj.*inputs|q_proj.*outputs"),
    ],
)
def test_unsupported_device_or_parallel_size_is_rejected(wide, make, device, over, message):
    with pytest.raises(ValueError, match=message):
        make("fp8", wide, **over).engine_overrides(device)


def test_experts_on_a_cpu_without_amx_are_rejected(experts, make, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with pytest.raises(ValueError, match="need a CPU with AMX"):
        make("fp8", experts).engine_overrides("cpu")


def test_experts_on_several_ranks(tmp_path, make):
    """Experts of width 128: two ranks cannot hold half a block of each, but whole ones; vLLM's CPU kernel cannot."""
    sizes = dict(hidden_size=256, moe_intermediate_size=128, num_attention_heads=4, num_key_value_heads=4, head_dim=64)
    directory = write_tiny_model(tmp_path, kind="qwen3_moe", **sizes)
    with pytest.raises(ValueError, match=r"experts\.0\.down_proj \[256, 128\] has 128 inputs"):
        make("fp8", directory, tensor_model_parallel_size=2).engine_overrides("cuda")
    whole = make("fp8", directory, tensor_model_parallel_size=2, expert_parallel_size=2)
    whole.engine_overrides("cuda")
    with pytest.raises(ValueError, match=r"expert_parallel_size=2: vLLM's experts in fp8 on a CPU .* use 1, or"):
        whole.validate("cpu", installed=False)


def test_packed_layers_that_end_inside_a_block_are_rejected(dense, make):
    with pytest.raises(ValueError, match=r"gate_proj \[80, 96\] has 80 outputs"):
        make("fp8", dense).engine_overrides("cpu")


def test_engine_in_float32_is_rejected(wide, make):
    with pytest.raises(ValueError, match=r"rollout\.dtype=float32: .*set actor_rollout_ref\.rollout\.dtype=bfloat16"):
        make("fp8", wide, dtype="float32").engine_overrides("cpu")


def test_config_file_is_not_supported_yet(wide, make):
    with pytest.raises(NotImplementedError, match=r"quantization_config_file=x\.json: not supported yet"):
        make("fp8", wide, quantization_config_file="x.json").engine_overrides("cpu")
