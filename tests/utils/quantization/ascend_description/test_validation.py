"""Checkpoints and choices of layers that a description rejects."""

import re

import pytest

from fixtures.header_checkpoint import small_decoder, write_header_checkpoint
from verl.utils.quantization.ascend_description import build_description, validate_name_prefixes

MX, FLOAT = "W8A8_MXFP8", "FLOAT"


def test_attention_output_projection_is_cut_along_its_inputs(tmp_path):
    """o_proj has 64 inputs and down_proj 128, so each of four ranks has 16 and 32."""
    directory = write_header_checkpoint(tmp_path, *small_decoder())
    with pytest.raises(
        ValueError, match=r"self_attn.o_proj \[64, 64\] \(2 such\) has 64 inputs, 16 per rank"
    ) as refused:
        build_description(directory, tp_size=4)
    assert "down_proj" not in str(refused.value)


@pytest.mark.parametrize(("inner", "tp_size", "fits"), [(96, 2, True), (80, 2, True), (160, 4, True), (112, 2, False)])
def test_padded_shares_must_touch_no_further_group(tmp_path, inner, tp_size, fits):
    """vllm-ascend holds ceil(share / 32) scales; of 112 inputs, the second rank has 56 from position 24 of a group."""
    directory = write_header_checkpoint(tmp_path, *small_decoder(intermediate_size=inner))
    options = {"tp_size": tp_size, "ignore": [r"re:.*\.o_proj"]}
    with pytest.raises(ValueError, match=rf"down_proj.*{inner} inputs, {inner // tp_size} per rank"):
        build_description(directory, **options)
    if fits:
        assert build_description(directory, padded_shares=True, **options).quantized_layers
        return
    with pytest.raises(ValueError, match=r"down_proj.*112 inputs, 56 per rank: use tensor_model_parallel_size=1"):
        build_description(directory, padded_shares=True, **options)


def test_shares_of_experts_are_never_padded(tmp_path):
    directory = write_header_checkpoint(tmp_path, *small_decoder(experts=2, intermediate_size=96))
    with pytest.raises(ValueError, match=r"experts\.0\.down_proj.*96 inputs, 48 per rank"):
        build_description(directory, tp_size=2, padded_shares=True)


def test_column_parallel_inputs_may_end_inside_a_block(tmp_path):
    """Only down_proj is cut along its inputs, here 128 / 2; hidden_size 80 is not a multiple of 32."""
    directory = write_header_checkpoint(tmp_path, *small_decoder(hidden_size=80))
    assert len(build_description(directory, tp_size=2).quantized_layers) == 14


@pytest.mark.parametrize(
    ("ignore", "packed", "culprit"),
    [
        ("model.layers.1.self_attn.k_proj", r"q_proj,k_proj,v_proj", "model.layers.1.self_attn.k_proj is not"),
        (r"re:.*\.up_proj", r"gate_proj,up_proj", "model.layers.0.mlp.up_proj is not"),
    ],
)
def test_mixed_shards_of_a_packed_layer_are_rejected(dense, ignore, packed, culprit):
    with pytest.raises(ValueError, match=rf"\{{{packed}\}}.*{re.escape(culprit)}.*all of them or none"):
        build_description(dense, ignore=[ignore])


@pytest.mark.parametrize("ignore", [r"re:.*\.1\.mlp\.experts\.2\..*", r"re:.*experts.*down_proj"])
def test_mixed_experts_are_rejected(moe, ignore):
    with pytest.raises(ValueError, match=r"model.layers.\d.mlp.experts: the engine packs these 12 layers"):
        build_description(moe, ignore=[ignore])


def test_ignoring_every_layer_is_rejected(dense):
    with pytest.raises(ValueError, match="no layer is left to quantize"):
        build_description(dense, ignore=["re:.*"])


@pytest.mark.parametrize("kind", ["glm", "glm4"])
def test_a_packed_tensor_that_vllm_looks_up_by_its_parts_is_rejected(tmp_path, kind):
    config, tensors = small_decoder()
    for layer in (0, 1):
        mlp = f"model.layers.{layer}.mlp"
        (rows, columns), dtype = tensors.pop(f"{mlp}.gate_proj.weight")
        del tensors[f"{mlp}.up_proj.weight"]
        tensors[f"{mlp}.gate_up_proj.weight"] = ((2 * rows, columns), dtype)
    directory = write_header_checkpoint(tmp_path / kind, config | {"model_type": kind}, tensors)
    with pytest.raises(ValueError, match=r"0\.mlp\.gate_up_proj is one tensor, but .* asks .* gate_proj and up_proj"):
        build_description(directory)
    other = write_header_checkpoint(tmp_path / "phi3", config | {"model_type": "phi3"}, tensors)
    assert build_description(other).quantized_layers


def test_name_with_a_quantized_name_as_prefix_is_rejected(tmp_path):
    """A FLOAT `o_proj_extra` would leave `o_proj` unquantized in vllm-ascend 0.26, which compares with startswith."""
    config, tensors = small_decoder()
    tensors["model.layers.1.self_attn.o_proj_extra.weight"] = ((64, 64), "BF16")
    directory = write_header_checkpoint(tmp_path, config, tensors)
    with pytest.raises(
        ValueError,
        match=r"1.self_attn.o_proj is quantized and model.layers.1.self_attn.o_proj_extra is not.* 0\.26\.0 ",
    ):
        validate_name_prefixes(build_description(directory).to_json_dict(), "0.26.0")
    without = build_description(directory, ignore=["model.layers.1.self_attn.o_proj"])
    validate_name_prefixes(without.to_json_dict(), "0.26.0")


def test_router_name_as_prefix_of_a_projection_is_rejected():
    entries = {f"model.layers.0.mlp.{name}.weight": FLOAT for name in ("gate_proj", "up_proj")}
    with pytest.raises(ValueError, match=r"layers.0.mlp.gate is quantized and model.layers.0.mlp.gate_proj is not"):
        validate_name_prefixes(entries | {"model.layers.0.mlp.gate.weight": MX}, "0.26.0")
    validate_name_prefixes(entries | {"model.layers.0.mlp.gate.weight": FLOAT}, "0.26.0")


@pytest.mark.parametrize(
    ("name", "dtype", "config", "evidence"),
    [
        ("model.layers.0.mlp.up_proj.weight", "F8_E4M3", {}, "up_proj.weight is F8_E4M3"),
        ("model.layers.0.mlp.up_proj.weight", "I8", {}, "up_proj.weight is I8"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", "F32", {}, "weight_scale_inv is F32"),
        ("model.norm.bias", "BF16", {"quantization_config": {"quant_method": "fp8"}}, r"quantization_config \(fp8\)"),
        ("model.norm.bias", "BF16", {"text_config": {"quantization_config": {"bits": 4}}}, "quantization_config"),
    ],
)
def test_quantized_checkpoint_is_rejected(tmp_path, name, dtype, config, evidence):
    own, tensors = small_decoder()
    directory = write_header_checkpoint(tmp_path, own | config, tensors | {name: ((128, 64), dtype)})
    with pytest.raises(ValueError, match=f"already quantized: .*{evidence}.*needs the BF16 checkpoint"):
        build_description(directory)


@pytest.mark.parametrize("kind", ["gptj", "orion", "stablelm"])
def test_a_model_that_vllm_packs_without_naming_the_parts_is_rejected(tmp_path, kind):
    config, tensors = small_decoder()
    directory = write_header_checkpoint(tmp_path / kind, config | {"model_type": kind}, tensors)
    with pytest.raises(ValueError, match=f"vLLM's {kind} packs projections without naming their parts"):
        build_description(directory)
