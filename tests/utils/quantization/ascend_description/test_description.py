"""The JSON of a description, lookups by parameter name, and sizes."""

import json
import pickle

import pytest

from fixtures.header_checkpoint import small_decoder, write_header_checkpoint
from fixtures.model_configs import CONFIGS
from verl.utils.quantization.ascend_description import build_description

MX, FLOAT = "W8A8_MXFP8", "FLOAT"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_layer_of_vllm_ascend_has_an_entry(model_dir, name):
    description = build_description(model_dir(name)).to_json_dict()
    layers = {key: kind for key, kind in description.items() if key.endswith(".weight")}
    assert set(layers.values()) == {MX, FLOAT}
    assert {key: value for key, value in description.items() if key not in layers} == {
        "quant_method": "ascend",
        "model_quant_type": MX,
        "group_size": 32,
    }
    assert layers["lm_head.weight"] == FLOAT  # also in the tied model, whose checkpoint does not have it
    stem = "model.language_model" if "VL" in name else "model"
    for key in (f"{stem}.embed_tokens", f"{stem}.norm", f"{stem}.layers.0.input_layernorm"):
        assert layers[f"{key}.weight"] == FLOAT
    assert all(kind == FLOAT for key, kind in layers.items() if "visual" in key)
    json.dumps(description)


def test_first_expert_describes_a_mixture_of_experts(model_dir):
    layers = build_description(model_dir("Qwen3-30B-A3B")).to_json_dict()
    block = {key: kind for key, kind in layers.items() if key.startswith("model.layers.7.mlp.")}
    assert block == {
        "model.layers.7.mlp.gate.weight": FLOAT,
        "model.layers.7.mlp.experts.weight": MX,
        "model.layers.7.mlp.experts.0.gate_proj.weight": MX,
        "model.layers.7.mlp.experts.0.up_proj.weight": MX,
        "model.layers.7.mlp.experts.0.down_proj.weight": MX,
    }


def test_projections_that_vllm_ascend_absorbs_stay_unquantized(model_dir):
    description = build_description(model_dir("DeepSeek-V3"))
    layers = description.to_json_dict()
    assert layers["model.layers.0.self_attn.kv_b_proj.weight"] == FLOAT
    assert layers["model.layers.0.self_attn.q_a_layernorm.weight"] == FLOAT
    assert layers["model.layers.3.mlp.gate.weight"] == FLOAT
    prediction = {kind for key, kind in layers.items() if key.startswith("model.layers.5.")}
    assert prediction == {FLOAT}
    assert not description.is_quantized("model.layers.3.mlp.gate.e_score_correction_bias")


def test_lookup_by_parameter_name(model_dir):
    description = pickle.loads(pickle.dumps(build_description(model_dir("Qwen2.5-7B"))))
    assert description.is_quantized("model.layers.3.self_attn.q_proj.weight")
    assert not description.is_quantized("model.layers.3.self_attn.q_proj.bias")
    assert not description.is_quantized("model.embed_tokens.weight")
    moe = build_description(model_dir("Qwen3-30B-A3B"))
    assert moe.is_quantized("model.layers.0.mlp.experts.127.down_proj.weight")
    with pytest.raises(
        ValueError, match=r"q_prj.weight' is not in the checkpoint .*similar: 'model.layers.3.self_attn.q_proj"
    ):
        description.is_quantized("model.layers.3.self_attn.q_prj.weight")
    with pytest.raises(ValueError, match="is not in the checkpoint"):
        moe.is_quantized("model.layers.0.mlp.experts.gate_up_proj")


def test_bytes_before_and_after_quantization(model_dir):
    h, i, vocab = 1024, 3072, 151936
    projections = [(2048, h), (1024, h), (1024, h), (h, 2048), (i, h), (i, h), (h, i)]
    before = after = 0
    for n, k in projections:
        before += 2 * n * k
        after += n * k + n * (k // 32)
    rest = 2 * (vocab * h + h + 28 * (2 * h + 2 * 128))
    layers = build_description(model_dir("Qwen3-0.6B")).layers
    assert sum(layer.info.nbytes for layer in layers) == 28 * before + rest
    assert sum(layer.engine_nbytes for layer in layers) == 28 * after + rest


@pytest.mark.parametrize(("k", "groups"), [(80, 3), (96, 3), (4304, 135)])
def test_inputs_with_a_partial_last_block_are_quantized(tmp_path, k, groups):
    description = build_description(write_header_checkpoint(tmp_path, *small_decoder(intermediate_size=k)))
    layer = description.layer("model.layers.0.mlp.down_proj.weight")
    assert layer.quantized and layer.k == k
    assert layer.engine_nbytes == 64 * k + 64 * groups


def test_bytes_of_mxfp4(model_dir):
    """Half a byte per weight, plus 1 scale byte per 32."""
    h, i = 1024, 3072
    projections = [(2048, h), (1024, h), (1024, h), (h, 2048), (i, h), (i, h), (h, i)]
    description = build_description(model_dir("Qwen3-0.6B"), scheme="W4A8_MXFP")
    quantized = sum(layer.engine_nbytes for layer in description.layers if layer.quantized)
    assert quantized == 28 * sum(n * k // 2 + n * k // 32 for n, k in projections)
    rest = sum(layer.info.nbytes for layer in description.layers if not layer.quantized)
    norms = sum(2 * info.shape[0] for info in description.parameters.values() if len(info.shape) == 1)
    matrices = sum(layer.info.nbytes for layer in description.layers if layer.reason and len(layer.info.shape) == 2)
    assert description.engine_bytes(2) == quantized + norms + matrices and rest >= matrices


def test_scheme_of_every_entry(dense):
    eight, four = (build_description(dense, scheme=scheme).to_json_dict() for scheme in ("W8A8_MXFP8", "W4A8_MXFP"))
    assert eight["model_quant_type"] == "W8A8_MXFP8" and four["model_quant_type"] == "W4A8_MXFP"
    assert {
        key: value.replace("W8A8_MXFP8", "W4A8_MXFP") if isinstance(value, str) else value
        for key, value in eight.items()
    } == four
