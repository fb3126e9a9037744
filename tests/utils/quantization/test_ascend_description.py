"""The description made for vllm-ascend: real models' names and sizes, and everything that is refused."""

import json
import pickle
import re
import subprocess
import sys

import pytest
from transformers import DeepseekV3Config, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig, Qwen3VLConfig

from fixtures.header_checkpoint import small_decoder, tensors_of_config, write_header_checkpoint
from verl.utils.quantization.ascend_description import build_description, load_description

MX, FLOAT = "W8A8_MXFP8", "FLOAT"


def qwen3(hidden, inter, layers, heads, tied, kv=8):
    sizes = {"hidden_size": hidden, "intermediate_size": inter, "num_hidden_layers": layers}
    attention = {"num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": 128}
    return Qwen3Config(**sizes, **attention, vocab_size=151936, tie_word_embeddings=tied)


def qwen3_vl():
    text = qwen3(4096, 12288, 36, 32, False).to_dict()
    vision = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096}
    return Qwen3VLConfig(
        text_config=text | {"model_type": "qwen3_vl_text"}, vision_config=vision, tie_word_embeddings=False
    )


CONFIGS = {
    "Qwen3-0.6B": lambda: qwen3(1024, 3072, 28, 16, True),
    "Qwen3-8B": lambda: qwen3(4096, 12288, 36, 32, False),
    "Qwen3-32B": lambda: qwen3(5120, 25600, 64, 64, False),
    "Qwen3-30B-A3B": lambda: Qwen3MoeConfig(
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        vocab_size=151936,
        tie_word_embeddings=False,
    ),
    "Qwen2.5-7B": lambda: Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        tie_word_embeddings=False,
    ),
    "Llama-3-8B": lambda: LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
    ),
    "DeepSeek-V3": lambda: DeepseekV3Config(num_hidden_layers=5, first_k_dense_replace=3),
    "Qwen3-VL-8B": qwen3_vl,
}

GQA = {f"self_attn.{name}_proj" for name in "qkvo"}
MLP = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
MLA = {f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")}
EXPERTS = {f"mlp.experts.{name}_proj" for name in ("gate", "up", "down")}
SHARED = {f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")}


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """Directory of a model by name, made once."""
    made = {}

    def make(name):
        if name not in made:
            config = CONFIGS[name]()
            tensors = tensors_of_config(config)
            if (
                name == "DeepSeek-V3"
            ):  # its checkpoint has the layers of multi-token prediction, transformers drops them
                for key in [key for key in tensors if key.startswith("model.layers.4.")]:
                    tensors[key.replace(".4.", ".5.", 1)] = tensors[key]
                tensors["model.layers.5.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
                tensors["model.layers.5.eh_proj.weight"] = ((7168, 14336), "BF16")
                tensors["model.layers.5.shared_head.head.weight"] = tensors["lm_head.weight"]
            shards = 3 if name in ("Qwen3-30B-A3B", "DeepSeek-V3") else 1
            directory = tmp_path_factory.mktemp("models") / name
            made[name] = write_header_checkpoint(directory, config.to_dict(), tensors, shards=shards)
        return made[name]

    return make


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
def test_exactly_the_decoders_projections_are_quantized(model_dir, name, projections, count):
    description = build_description(model_dir(name))
    assert kinds(description.quantized_layers) == projections
    assert len(description.quantized_layers) == count
    prefix = "model.language_model.layers." if name == "Qwen3-VL-8B" else "model.layers."
    assert all(layer.startswith(prefix) for layer in description.quantized_layers)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_vllm_ascend_asks_for_is_described(model_dir, name):
    description = build_description(model_dir(name)).to_json_dict()
    layers = {key: kind for key, kind in description.items() if key.endswith(".weight")}
    assert set(layers.values()) == {MX, FLOAT}
    assert {key: value for key, value in description.items() if key not in layers} == {
        "quant_method": "ascend",
        "model_quant_type": MX,
        "group_size": 32,
    }
    assert layers["lm_head.weight"] == FLOAT  # in the tied model too, where the checkpoint does not have it
    stem = "model.language_model" if "VL" in name else "model"
    for key in (f"{stem}.embed_tokens", f"{stem}.norm", f"{stem}.layers.0.input_layernorm"):
        assert layers[f"{key}.weight"] == FLOAT
    assert all(kind == FLOAT for key, kind in layers.items() if "visual" in key)
    json.dumps(description)


def test_mixture_of_experts_is_described_by_its_first_expert(model_dir):
    layers = build_description(model_dir("Qwen3-30B-A3B")).to_json_dict()
    block = {key: kind for key, kind in layers.items() if key.startswith("model.layers.7.mlp.")}
    assert block == {
        "model.layers.7.mlp.gate.weight": FLOAT,
        "model.layers.7.mlp.experts.weight": MX,
        "model.layers.7.mlp.experts.0.gate_proj.weight": MX,
        "model.layers.7.mlp.experts.0.up_proj.weight": MX,
        "model.layers.7.mlp.experts.0.down_proj.weight": MX,
    }


def test_latent_attention_keeps_what_vllm_ascend_absorbs(model_dir):
    description = build_description(model_dir("DeepSeek-V3"))
    layers = description.to_json_dict()
    assert layers["model.layers.0.self_attn.kv_b_proj.weight"] == FLOAT
    assert layers["model.layers.0.self_attn.q_a_layernorm.weight"] == FLOAT
    assert layers["model.layers.3.mlp.gate.weight"] == FLOAT
    prediction = {kind for key, kind in layers.items() if key.startswith("model.layers.5.")}
    assert prediction == {FLOAT}
    assert not description.is_quantized("model.layers.3.mlp.gate.e_score_correction_bias")


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
def test_the_reason_is_given(model_dir, tmp_path, name, layer, reason):
    description = build_description(model_dir(name))
    assert description.layer(f"{layer}.weight").reason == reason
    assert reason in description.table()
    if reason == "vision or audio tower":
        return  # its description's author may know better
    path = tmp_path / "description.json"
    path.write_text(json.dumps(description.to_json_dict() | {f"{layer}.weight": MX}))
    with pytest.raises(ValueError, match=rf"{layer} .* cannot be \({reason}\)"):
        load_description(path, model_dir(name))


def test_the_encoder_is_told_by_parameter_name(model_dir):
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


def test_bytes_before_and_after(model_dir):
    h, i, vocab = 1024, 3072, 151936
    projections = [(2048, h), (1024, h), (1024, h), (h, 2048), (i, h), (i, h), (h, i)]
    before = after = 0
    for n, k in projections:
        before += 2 * n * k
        after += n * k + n * (k // 32)
    rest = 2 * (vocab * h + h + 28 * (2 * h + 2 * 128))
    layers = build_description(model_dir("Qwen3-0.6B")).layers
    assert sum(layer.info.nbytes for layer in layers) == 28 * before + rest
    assert sum(layer.nbytes_after for layer in layers) == 28 * after + rest


@pytest.mark.parametrize(("k", "groups"), [(80, 3), (96, 3), (4304, 135)])
def test_inputs_that_end_in_a_partial_block_are_described(tmp_path, k, groups):
    description = build_description(write_header_checkpoint(tmp_path, *small_decoder(intermediate_size=k)))
    layer = description.layer("model.layers.0.mlp.down_proj.weight")
    assert layer.quantized and layer.k == k
    assert layer.nbytes_after == 64 * k + 64 * groups


def test_row_parallel_inputs_that_do_not_divide_into_blocks(model_dir):
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


def test_mixed_latent_projections(model_dir):
    with pytest.raises(ValueError, match=r"q_a_proj,kv_a_proj_with_mqa"):
        build_description(model_dir("DeepSeek-V3"), ignore=[r"re:.*kv_a_proj_with_mqa"])


def test_command_line(model_dir, tmp_path):
    output = tmp_path / "out.json"
    command = [
        sys.executable,
        "-m",
        "verl.utils.quantization.ascend_description",
        str(model_dir("Qwen3-0.6B")),
        "--tp",
        "2",
    ]
    done = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True, check=True)
    expected = build_description(model_dir("Qwen3-0.6B"), tp_size=2)
    assert json.loads(output.read_text()) == expected.to_json_dict()
    row = r"model.layers.\*.mlp.down_proj +28 +1024 x 3072 +BF16 +row +168.0 MiB +86.6 MiB +MXFP8"
    assert re.search(row, done.stdout), done.stdout
    assert "In MXFP8: 196 of 311 weights, tensor-parallel size 2" in done.stdout
