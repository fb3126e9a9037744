"""Layers of a checkpoint: fused experts, and checkpoints whose decoder cannot be read."""

import pytest

from fixtures.header_checkpoint import small_decoder, write_header_checkpoint
from verl.utils.quantization.ascend_description import build_description

MX, FLOAT = "W8A8_MXFP8", "FLOAT"


def test_checkpoint_with_missing_layers_is_rejected(tmp_path):
    config, tensors = small_decoder()
    directory = write_header_checkpoint(tmp_path, config | {"num_hidden_layers": 3}, tensors)
    with pytest.raises(ValueError, match=r"num_hidden_layers=3, the checkpoint has no model.layers.2"):
        build_description(directory)


def test_model_without_a_known_decoder_is_rejected(tmp_path):
    directory = write_header_checkpoint(tmp_path, {"model_type": "gpt2"}, {"wte.weight": ((8, 4), "F32")})
    with pytest.raises(ValueError, match=r"models of type 'gpt2' cannot be quantized"):
        build_description(directory)


def test_experts_that_vllm_takes_apart_are_rejected(tmp_path):
    config, tensors = small_decoder()
    name = "model.layers.1.block_sparse_moe.input_linear.weight"
    directory = write_header_checkpoint(tmp_path, config, tensors | {name: ((4, 64, 32), "BF16")})
    with pytest.raises(ValueError, match=rf"{name} \[4, 64, 32\]: .* takes them apart without their scales"):
        build_description(directory)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("h", "i"), [(64, 96), (64, 32), (64, 64)])
def test_layout_of_fused_experts_is_found(tmp_path, h, i, transposed):
    """This includes square tensors: one of the two then fits both layouts."""
    config, tensors = small_decoder(experts=4, hidden_size=h)
    config |= {"intermediate_size": 128, "moe_intermediate_size": i}
    tensors = {name: value for name, value in tensors.items() if ".experts." not in name}
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        tensors[f"{stem}.gate_up_proj"] = ((4, h, 2 * i) if transposed else (4, 2 * i, h), "BF16")
        tensors[f"{stem}.down_proj"] = ((4, i, h) if transposed else (4, h, i), "BF16")
    description = build_description(write_header_checkpoint(tmp_path, config, tensors))
    gate_up = description.layer("model.layers.1.mlp.experts.gate_up_proj")
    down = description.layer("model.layers.1.mlp.experts.down_proj")
    assert (gate_up.k, down.k) == (h, i)
    assert gate_up.engine_nbytes == 4 * 2 * i * (h + h // 32)
    assert gate_up.axis == down.axis == (-2 if transposed else -1)
    layers = description.to_json_dict()
    for name in ("experts.0.gate_proj", "experts.0.up_proj", "experts.0.down_proj", "experts"):
        assert layers[f"model.layers.1.mlp.{name}.weight"] == MX
    assert "model.layers.1.mlp.experts.gate_up_proj.weight" not in layers
    with pytest.raises(ValueError, match="the engine packs these 2 layers into one"):
        build_description(tmp_path, ignore=["model.layers.1.mlp.experts.down_proj"])


def test_fused_experts_that_do_not_fit_the_config_are_rejected(tmp_path):
    config, tensors = small_decoder(experts=4)
    tensors = {name: value for name, value in tensors.items() if ".experts." not in name}
    for layer in range(2):
        tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = ((4, 100, 64), "BF16")
        tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = ((4, 64, 50), "BF16")
    with pytest.raises(ValueError, match=r"gate_up_proj \(4, 100, 64\) .* do not fit hidden_size=64"):
        build_description(write_header_checkpoint(tmp_path, config, tensors))
