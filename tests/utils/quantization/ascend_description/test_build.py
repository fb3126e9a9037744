"""Descriptions derived from checkpoints: names and sizes of real models, and `ignore`."""

import json
import re

import pytest

from verl.utils.quantization.ascend_description import build_description, load_description
from verl.utils.quantization.ascend_description.table import render_table

MX, FLOAT = "W8A8_MXFP8", "FLOAT"

GQA = {f"self_attn.{name}_proj" for name in "qkvo"}

MLP = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}

MLA = {f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")}

EXPERTS = {f"mlp.experts.{name}_proj" for name in ("gate", "up", "down")}

SHARED = {f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")}


def kinds(names):
    return {re.sub(r"^(model\.(language_model\.)?layers\.\d+\.)|(?<=experts)\.\d+", "", name) for name in names}


@pytest.mark.parametrize(
    ("name", "projections", "count"),
    [
        ("Qwen3-0.6B", GQA | MLP, 28 * 7),
        ("Qwen3-8B", GQA | MLP, 36 * 7),
        ("Qwen3-32B", GQA | MLP, 64 * 7),
        ("Qwen3-30B-A3B", GQA | EXPERTS, 48 * (4 + 128 * 3)),
        ("Qwen2.5-7B", GQA | MLP, 28 * 7),
        ("Llama-3-8B", GQA | MLP, 32 * 7),
        ("DeepSeek-V3", MLA | MLP | EXPERTS | SHARED, 3 * 7 + 2 * (4 + 256 * 3 + 3)),
        ("Qwen3-VL-8B", GQA | MLP, 36 * 7),
    ],
)
def test_only_projections_of_the_decoder_are_quantized(model_dir, name, projections, count):
    description = build_description(model_dir(name))
    assert kinds(description.quantized_layers) == projections
    assert len(description.quantized_layers) == count
    prefix = "model.language_model.layers." if name == "Qwen3-VL-8B" else "model.layers."
    assert all(layer.startswith(prefix) for layer in description.quantized_layers)


@pytest.mark.parametrize(
    ("name", "layer", "reason"),
    [
        ("DeepSeek-V3", "model.layers.0.self_attn.kv_b_proj", "vllm-ascend absorbs it into attention"),
        ("DeepSeek-V3", "model.layers.5.self_attn.o_proj", "multi-token prediction layer"),
        ("DeepSeek-V3", "model.layers.5.shared_head.head", "output head"),
        ("DeepSeek-V3", "model.layers.3.mlp.gate", "router"),
        ("Qwen3-VL-8B", "model.visual.blocks.0.attn.proj", "vision or audio tower"),
        ("Qwen3-VL-8B", "model.language_model.embed_tokens", "embedding"),
        ("Qwen3-0.6B", "model.norm", "vector"),
    ],
)
def test_unquantized_layers_have_a_reason(model_dir, tmp_path, name, layer, reason):
    description = build_description(model_dir(name))
    assert description.layer(f"{layer}.weight").reason == reason
    assert reason in render_table(description)
    if reason == "vision or audio tower":
        return  # a given description may quantize these
    path = tmp_path / "description.json"
    path.write_text(json.dumps(description.to_json_dict() | {f"{layer}.weight": MX}))
    with pytest.raises(ValueError, match=rf"{layer} .* cannot be \({reason}\)"):
        load_description(path, model_dir(name))


def test_mixed_latent_projections_are_rejected(model_dir):
    with pytest.raises(ValueError, match=r"q_a_proj,kv_a_proj_with_mqa"):
        build_description(model_dir("DeepSeek-V3"), ignore=[r"re:.*kv_a_proj_with_mqa"])


def test_row_parallel_inputs_that_blocks_do_not_divide_are_rejected(model_dir):
    directory = model_dir("Qwen3-30B-A3B")
    build_description(directory, tp_size=8)
    with pytest.raises(ValueError) as refused:
        build_description(directory, tp_size=16)
    message = str(refused.value)
    assert "tensor_model_parallel_size=16" in message
    assert "model.layers.0.mlp.experts.0.down_proj [2048, 768] (6144 such) has 768 inputs, 48 per rank" in message
    assert "use tensor_model_parallel_size=1 or 2 or 3 or 4 or 6 or 8 or 12" in message
    ignore = json.loads(re.search(r"leave it out: (\{.*\}) in", message)[1])["ignore"]
    assert "self_attn.o_proj" not in message  # 4096 / 16 = 256
    left = build_description(directory, tp_size=16, ignore=ignore)
    assert kinds(left.quantized_layers) == GQA
    assert kinds(build_description(directory, tp_size=16, expert_parallel=True).quantized_layers) == GQA | EXPERTS


def test_ignore_accepts_names_and_patterns(dense):
    description = build_description(
        dense, ignore=["lm_head", "model.layers.0.mlp.down_proj", r"re:.*\.1\.self_attn\..*_proj"]
    )
    kept = set(build_description(dense).quantized_layers) - set(description.quantized_layers)
    assert kept == {"model.layers.0.mlp.down_proj", *(f"model.layers.1.self_attn.{n}_proj" for n in "qkvo")}
    assert description.to_json_dict()["model.layers.0.mlp.down_proj.weight"] == FLOAT
    assert not description.is_quantized("model.layers.0.mlp.down_proj.weight")


@pytest.mark.parametrize(
    "pattern", ["model.layers.0.mlp.down_prj", "down_proj", r"re:\.down_proj", r"re:.*mlp\.gate", "re:model.layers.7.*"]
)
def test_ignore_without_a_match_is_rejected(dense, pattern):
    with pytest.raises(ValueError, match=rf"ignore {re.escape(repr(pattern))}: matches no layer"):
        build_description(dense, ignore=[pattern])


def test_ignore_with_a_bad_regular_expression_is_rejected(dense):
    with pytest.raises(ValueError, match="not a regular expression"):
        build_description(dense, ignore=["re:*down"])
