"""Names and shapes from a config.json alone, against the models that transformers builds from it."""

import json

import pytest
from transformers import AutoConfig

from fixtures.header_checkpoint import tensors_of_config, write_header_checkpoint
from verl.utils.model_dir.public_models import PUBLIC_MODELS, public_config
from verl.utils.model_dir.shapes_from_config import index_of_config, read_index_or_config
from verl.utils.quantization.ascend_description import build_description
from verl.utils.quantization.ascend_description.command import main

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": SMALL | {"model_type": "llama"},
    "llama with biases, tied": SMALL
    | {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": SMALL | {"model_type": "mistral", "head_dim": 24},
    "qwen2": SMALL | {"model_type": "qwen2"},
    "qwen3": SMALL | {"model_type": "qwen3", "head_dim": 32},
    "qwen3 without grouped queries": SMALL | {"model_type": "qwen3", "head_dim": 8, "num_key_value_heads": 4},
    "qwen3_moe": SMALL | {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16},
    "qwen3_moe with dense layers": SMALL
    | {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "head_dim": 16,
        "mlp_only_layers": [0],
        "decoder_sparse_step": 2,
        "num_hidden_layers": 4,
    },
}


def built(config):
    return {name: shape for name, (shape, _) in tensors_of_config(AutoConfig.for_model(**config)).items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_tensors_are_those_of_the_model(tmp_path, name):
    index = index_of_config(tmp_path, CONFIGS[name])
    assert {name: info.shape for name, info in index.tensors.items()} == built(CONFIGS[name])


@pytest.mark.parametrize("name", PUBLIC_MODELS)
def test_public_models_are_of_kinds_that_transformers_knows(tmp_path, name):
    """Of two layers: all layers are alike."""
    config = public_config(tmp_path / name)
    assert config is not None
    config |= {"num_hidden_layers": 2} | ({"num_experts": 2} if "num_experts" in config else {})
    assert {name: info.shape for name, info in index_of_config(tmp_path, config).tensors.items()} == built(config)


# As the models' pages give them, in billions.
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Qwen2.5-0.5B-Instruct", 0.49),
        ("Qwen2.5-7B", 7.61),
        ("Qwen3-0.6B", 0.6),
        ("Qwen3-8B", 8.2),
        ("Qwen3-32B", 32.8),
        ("Qwen3-30B-A3B-Instruct-2507", 30.5),
        ("qwen3-235b-a22b", 235),
    ],
)
def test_sizes_of_public_models(tmp_path, name, billions):
    from verl.utils.model_dir.model_files import model_of_config

    config = public_config(tmp_path / name)
    assert config is not None
    parameters = model_of_config(tmp_path, config).parameters
    assert parameters is not None
    assert parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_no_public_model():
    assert public_config("/models/Qwen3-8") is None and public_config("/models/Qwen3-8B/mine") is None


def test_weights_count_where_there_are_any(tmp_path):
    tensors = tensors_of_config(AutoConfig.for_model(**CONFIGS["qwen3"]))
    folder = write_header_checkpoint(tmp_path / "whole", CONFIGS["qwen3"], tensors | {"extra.weight": ((4,), "F32")})
    assert "extra.weight" in read_index_or_config(folder).tensors
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_index_or_config(folder)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (SMALL | {"model_type": "mamba"}, "'mamba' consists of is known for llama"),
        ({"model_type": "qwen3", "vocab_size": 8}, "has no hidden_size"),
    ],
)
def test_what_a_config_does_not_tell(tmp_path, config, words):
    with pytest.raises(ValueError, match=words):
        index_of_config(tmp_path, config)


def test_a_description_from_the_config_alone(tmp_path, capsys):
    """The same as from the weights' headers."""
    config = CONFIGS["qwen3_moe"] | {"hidden_size": 128}
    whole = write_header_checkpoint(tmp_path / "whole", config, tensors_of_config(AutoConfig.for_model(**config)))
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_text(json.dumps(config))
    output = tmp_path / "description.json"
    assert main([str(alone), "-o", str(output)]) == 0
    assert json.loads(output.read_text()) == build_description(whole).to_json_dict()
    assert "In MXFP8" in capsys.readouterr().out
