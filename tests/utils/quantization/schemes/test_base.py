"""Requirements that `ascend` and `fp8` share."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fixtures.scheme_models import FP8_SIZES
from fixtures.tiny import write_tiny_model


@pytest.mark.parametrize("name", ["ascend", "fp8"])
def test_quantized_checkpoint_is_rejected(tmp_path, make, name):
    directory = write_tiny_model(tmp_path, **FP8_SIZES)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ValueError, match="already quantized"):
        make(name, directory).engine_overrides("cpu")


@pytest.mark.parametrize("name", ["ascend", "fp8"])
def test_experts_in_one_tensor_are_rejected(tmp_path, make, name, monkeypatch):
    directory = write_tiny_model(tmp_path, kind="qwen3_moe", hidden_size=128, moe_intermediate_size=128)
    weights = load_file(directory / "model.safetensors")
    fused = {key: tensor for key, tensor in weights.items() if ".experts." not in key}
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        fused[f"{prefix}.gate_up_proj"] = torch.zeros(4, 256, 128)
        fused[f"{prefix}.down_proj"] = torch.zeros(4, 128, 128)
    save_file(fused, directory / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    with pytest.raises(NotImplementedError, match=r"mlp\.experts\.\w+_proj.*one tensor"):
        make(name, directory).engine_overrides("cpu")


@pytest.mark.parametrize("name", ["ascend", "fp8"])
def test_engine_cannot_start_from_the_checkpoint(wide, make, name):
    """It would hold plain weights cast to e4m3, without scales, and report no error."""
    with pytest.raises(ValueError, match=r"rollout\.load_format=auto: .*use dummy"):
        make(name, wide, load_format="auto").engine_overrides("cpu")
    assert make(name, wide).engine_overrides("cpu")["quantization"] == name


@pytest.mark.parametrize(("name", "shown"), [(None, "null"), ("fp8", "fp8"), ("torchao", "torchao")])
def test_self_test_of_another_scheme_is_rejected(tmp_path, wide, make, name, shown):
    (tmp_path / "torchao.json").write_text("{}")
    over = {"quantization_config_file": str(tmp_path / "torchao.json")} if name == "torchao" else {}
    message = rf"rollout\.quantization_self_test=True: quantization={shown} has no self-test; use quantization=ascend"
    with pytest.raises(ValueError, match=message):
        make(name, wide, quantization_self_test=True, **over).engine_overrides("cpu")
    for chosen in (None, False):
        format_ = make(name, wide, quantization_self_test=chosen, **over)
        format_.validate_settings("cpu")
        assert format_.runs_self_test("npu") is False
