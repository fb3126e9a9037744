"""The release's config class reads verl's description and builds a model. Runs in the environment of a release."""

import importlib.machinery
import sys
import types

import numpy as np
import pytest
import torch
import torch_npu
from contract.vllm_ascend.harness import (
    RELEASE,
    AscendModelSlimConfig,
    build_model,
    engine,
    make_vllm_config,
    modelslim_config,
    schemes,
)
from transformers import DeepseekV3Config

from fixtures.header_checkpoint import small_decoder, tensors_of_config, write_header_checkpoint
from fixtures.tiny import write_tiny_model
from verl.utils.quantization.ascend_description import build_description
from verl.utils.quantization.ascend_releases import reads_exact_names

pytestmark = pytest.mark.feature("description")

MX = "W8A8_MXFP8"
LINEAR, MOE = "AscendW8A8MXFP8DynamicLinearMethod", "AscendW8A8MXFP8DynamicFusedMoEMethod"


def make(tmp_path, kind, ignore=(), **over):
    directory = write_tiny_model(tmp_path, kind=kind, dtype="bfloat16", **over)
    description = build_description(directory, ignore=ignore)
    return make_vllm_config(directory, description.to_json_dict(), load_format="dummy")


@pytest.mark.parametrize("tied", [True, False])
def test_every_projection_of_a_dense_model_is_quantized(tmp_path, tied):
    config = make(tmp_path, "qwen3", tied=tied)
    assert isinstance(config.quant_config, AscendModelSlimConfig)
    assert config.quant_config.quant_description["quant_method"] == "ascend"
    with engine(config):
        found = schemes(build_model(config))
    layers = [f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.qkv_proj", "self_attn.o_proj")]
    layers += [f"model.layers.{i}.mlp.{name}" for i in range(2) for name in ("gate_up_proj", "down_proj")]
    assert {name for name, scheme in found.items() if scheme == LINEAR} == set(layers)
    assert found["model.embed_tokens"] == "UnquantizedEmbeddingMethod"
    if not tied:
        assert found["lm_head"] == "UnquantizedEmbeddingMethod"


def test_ignored_layers_stay_unquantized(tmp_path):
    ignore = [r"re:model\.layers\.0\.self_attn\.[qkv]_proj", "model.layers.1.mlp.down_proj"]
    config = make(tmp_path, "qwen3", ignore)
    with engine(config):
        found = schemes(build_model(config))
    assert found["model.layers.0.self_attn.qkv_proj"] == "AscendUnquantizedLinearMethod"
    assert found["model.layers.1.mlp.down_proj"] == "AscendUnquantizedLinearMethod"
    assert found["model.layers.1.self_attn.qkv_proj"] == found["model.layers.0.mlp.down_proj"] == LINEAR


def test_experts_are_quantized(tmp_path):
    config = make(tmp_path, "qwen3_moe")
    with engine(config):
        model = build_model(config)
    found = schemes(model)
    experts = {name: scheme for name, scheme in found.items() if ".experts" in name}
    assert set(experts.values()) == {MOE} and {name.split(".experts")[0] for name in experts} == {
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    }
    assert "Unquantized" in found["model.layers.0.mlp.gate"]
    parameters = {name: parameter for name, parameter in model.named_parameters() if ".layers.1.mlp.experts" in name}
    shapes = {name.rpartition(".")[2]: (tuple(p.shape), p.dtype) for name, p in parameters.items()}
    fp8, byte = torch.float8_e4m3fn, torch.uint8
    assert shapes == {
        "w13_weight": ((4, 64, 128), fp8),
        "w13_weight_scale": ((4, 1, 128, 2), byte),
        "w2_weight": ((4, 64, 64), fp8),
        "w2_weight_scale": ((4, 1, 64, 2), byte),
    }


def kind(config, prefix, mapping):
    """Return the type that the release finds for a layer of vLLM's name."""
    if not hasattr(config, "is_layer_skipped_ascend"):  # from 0.27 on
        config.packed_modules_mapping = dict(mapping)
        config._update_packed_modules_mapping("a model without a table")
        found = modelslim_config.get_quant_type_for_layer(
            config.quant_description, prefix, config.packed_modules_mapping
        )
        return found or "FLOAT"
    if config.is_layer_skipped_ascend(prefix, mapping):
        return "FLOAT"
    return modelslim_config.get_linear_quant_type(config.quant_description, prefix, mapping)


# The packing table of DeepSeek-V3: the release's up to 0.26, later that of vLLM's model.
LATENT_MAPPING = getattr(modelslim_config, "packed_modules_model_mapping", {}).get(
    "deepseek_v3",
    {"gate_up_proj": ["gate_proj", "up_proj"], "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"]},
)


def test_latent_attention_with_experts_is_read_by_the_release(tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64, "num_hidden_layers": 2}
    ranks = {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}
    config = DeepseekV3Config(**sizes, **ranks, n_routed_experts=4, first_k_dense_replace=1, num_attention_heads=4)
    directory = write_header_checkpoint(tmp_path, config.to_dict(), tensors_of_config(config))
    release = AscendModelSlimConfig(build_description(directory).to_json_dict())
    expected = {
        "0.self_attn.fused_qkv_a_proj": MX,
        "0.self_attn.q_b_proj": MX,
        "0.self_attn.kv_b_proj": "FLOAT",
        "0.self_attn.o_proj": MX,
        "0.mlp.gate_up_proj": MX,
        "1.mlp.gate": "FLOAT",
        "1.mlp.experts": MX,
        "1.mlp.shared_experts.gate_up_proj": MX,
        "1.mlp.shared_experts.down_proj": MX,
    }
    assert {name: kind(release, f"model.layers.{name}", LATENT_MAPPING) for name in expected} == expected
    assert kind(release, "model.embed_tokens", LATENT_MAPPING) == "FLOAT"
    assert kind(release, "lm_head", LATENT_MAPPING) == "FLOAT"


def test_experts_of_a_model_without_a_packing_table_in_the_release(tmp_path):
    config, tensors = small_decoder(experts=4)
    release = AscendModelSlimConfig(
        build_description(write_header_checkpoint(tmp_path, config, tensors)).to_json_dict()
    )
    assert kind(release, "model.layers.1.mlp.experts", {}) == MX
    assert kind(release, "model.layers.1.mlp.gate", {}) == "FLOAT"


@pytest.mark.skipif(RELEASE in ("0.18.0", "0.23.0", "0.26.0rc1"), reason="the release looks at the first projection")
def test_shards_of_an_expert_must_be_alike(tmp_path):
    """verl rejects such a description before."""
    config, tensors = small_decoder(experts=4)
    entries = build_description(write_header_checkpoint(tmp_path, config, tensors)).to_json_dict()
    entries["model.layers.1.mlp.experts.0.down_proj.weight"] = "FLOAT"
    with pytest.raises(ValueError, match=r"Not all shards of model\.layers\.1\.mlp\.experts"):
        kind(AscendModelSlimConfig(entries), "model.layers.1.mlp.experts", {})


def test_name_that_starts_with_another_layers_name(tmp_path):
    """Up to 0.26 the layer is left unquantized, so verl refuses such names for these releases."""
    entries = build_description(write_header_checkpoint(tmp_path, *small_decoder())).to_json_dict()
    release = AscendModelSlimConfig(entries | {"model.layers.1.mlp.down_proj_extra.weight": "FLOAT"})
    found = kind(release, "model.layers.1.mlp.down_proj", {})
    assert (found == MX) == reads_exact_names(RELEASE)
    assert kind(release, "model.layers.0.mlp.down_proj", {}) == MX


def test_checkpoint_whose_values_are_its_keys_has_no_v_proj(tmp_path):
    """Gemma 4's `attention_k_eq_v`: from 0.26 on the release accepts the missing entry."""
    config, tensors = small_decoder()
    tensors = {name: value for name, value in tensors.items() if "v_proj" not in name}
    release = AscendModelSlimConfig(
        build_description(write_header_checkpoint(tmp_path, config, tensors)).to_json_dict()
    )
    mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    if RELEASE in ("0.18.0", "0.23.0"):
        with pytest.raises(KeyError, match="v_proj"):
            kind(release, "model.layers.1.self_attn.qkv_proj", mapping)
    else:
        assert kind(release, "model.layers.1.self_attn.qkv_proj", mapping) == MX


class _Placeholder(types.ModuleType):
    """A module from which any name can be imported."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@pytest.fixture
def torchvision(monkeypatch):
    """Provide torchvision, which transformers' image processors import but never call; no build fits this torch."""
    names = ("", ".io", ".transforms", ".transforms.functional", ".transforms.v2", ".transforms.v2.functional")
    for name in (f"torchvision{name}" for name in names):
        module = _Placeholder(name)
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)


@pytest.mark.usefixtures("torchvision")
def test_vision_model_with_its_name_mapper(tmp_path):
    from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration

    config, decoder = small_decoder()
    tensors = {name.replace("model.", "model.language_model.", 1): value for name, value in decoder.items()}
    tower = {"attn.qkv": (96, 32), "attn.proj": (32, 32), "mlp.linear_fc1": (64, 32), "mlp.linear_fc2": (32, 64)}
    tensors |= {f"model.visual.blocks.1.{name}.weight": (shape, "BF16") for name, shape in tower.items()}
    tensors["model.visual.merger.linear_fc2.weight"] = ((64, 128), "BF16")
    directory = write_header_checkpoint(tmp_path, {"model_type": "qwen3_vl", "text_config": config}, tensors)
    release = AscendModelSlimConfig(build_description(directory).to_json_dict())
    release.apply_vllm_mapper(Qwen3VLForConditionalGeneration.hf_to_vllm_mapper)
    mapping = Qwen3VLForConditionalGeneration.packed_modules_mapping
    expected = {
        "language_model.model.layers.1.self_attn.qkv_proj": MX,
        "language_model.model.layers.1.mlp.gate_up_proj": MX,
        "language_model.model.layers.1.mlp.down_proj": MX,
        "language_model.lm_head": "FLOAT",
        "language_model.model.embed_tokens": "FLOAT",
        "visual.blocks.1.attn.qkv": "FLOAT",
        "visual.blocks.1.attn.proj": "FLOAT",
        "visual.blocks.1.mlp.linear_fc1": "FLOAT",
        "visual.merger.linear_fc2": "FLOAT",
    }
    assert {name: kind(release, name, mapping) for name in expected} == expected


def blocks_of(x):
    """Scale each block of 32 along the last axis to a power of two and round it to e4m3, in float64."""
    x = x.to(torch.float64).numpy()
    result = np.zeros_like(x)
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], 32):
            block = x[row, start : start + 32]
            largest = np.abs(block).max()
            if largest == 0:
                continue
            scale = 2.0 ** (np.floor(np.log2(largest)) - 8)
            for i, value in enumerate(block / scale):
                exponent = max(np.floor(np.log2(abs(value))), -6) if value else 0
                step = 2.0 ** (exponent - 3)
                result[row, start + i] = np.clip(np.round(value / step) * step, -448, 448) * scale
    return result


def test_linear_layer_computes_the_product_of_quantized_matrices(tmp_path):
    """The layer's weight_loader loads the weights; the release's scheme processes and applies them."""
    config = make(tmp_path, "qwen3")
    generator = torch.Generator().manual_seed(0)
    shards = {name: torch.randn(64, 64, generator=generator, dtype=torch.bfloat16) for name in "kv"}
    shards["q"] = torch.randn(128, 64, generator=generator, dtype=torch.bfloat16)
    x = torch.randn(5, 64, generator=generator, dtype=torch.bfloat16)
    from vllm.model_executor.layers.linear import QKVParallelLinear

    # vLLM sets the packing table of the model's class when it builds the model.
    config.quant_config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    with engine(config):
        layer = QKVParallelLinear(
            64, 32, 4, 2, bias=False, params_dtype=torch.bfloat16, quant_config=config.quant_config,
            prefix="model.layers.0.self_attn.qkv_proj",
        )  # fmt: skip
        for name, weight in shards.items():
            values, scales = torch_npu.npu_dynamic_mx_quant(weight, dst_type=torch.float8_e4m3fn)
            layer.weight.weight_loader(layer.weight, values, name)
            layer.weight_scale.weight_loader(layer.weight_scale, scales.flatten(-2)[:, :2], name)
        layer.quant_method.process_weights_after_loading(layer)
        output, _ = layer(x)
    weight = blocks_of(torch.cat([shards[name] for name in "qkv"]))
    expected = blocks_of(x) @ weight.T
    assert output.dtype == torch.bfloat16
    error = np.abs(output.to(torch.float64).numpy() - expected).max() / np.abs(expected).max()
    assert error < 2**-8  # rounding of the output
