"""Names and shapes from a config.json alone, compared with the models that transformers builds from it."""

import json

import pytest
from transformers import AutoConfig

from fixtures.header_checkpoint import tensors_of_config, write_header_checkpoint
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
def test_tensors_equal_those_of_the_model(tmp_path, name):
    index = index_of_config(tmp_path, CONFIGS[name])
    assert {name: info.shape for name, info in index.tensors.items()} == built(CONFIGS[name])


def test_weights_take_precedence_over_the_config(tmp_path):
    tensors = tensors_of_config(AutoConfig.for_model(**CONFIGS["qwen3"]))
    folder = write_header_checkpoint(tmp_path / "whole", CONFIGS["qwen3"], tensors | {"extra.weight": ((4,), "F32")})
    assert "extra.weight" in read_index_or_config(folder).tensors
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="too few for a header"):
        read_index_or_config(folder)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (SMALL | {"model_type": "mamba"}, "of type 'mamba' \\(it knows llama"),
        ({"model_type": "qwen3", "vocab_size": 8}, "has no hidden_size"),
    ],
)
def test_config_without_the_needed_fields_is_rejected(tmp_path, config, words):
    with pytest.raises(ValueError, match=words):
        index_of_config(tmp_path, config)


def test_description_from_the_config_alone(tmp_path, capsys):
    """It equals the description from the headers of the weights."""
    config = CONFIGS["qwen3_moe"] | {"hidden_size": 128}
    whole = write_header_checkpoint(tmp_path / "whole", config, tensors_of_config(AutoConfig.for_model(**config)))
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_text(json.dumps(config))
    output = tmp_path / "description.json"
    assert main([str(alone), "-o", str(output)]) == 0
    assert json.loads(output.read_text()) == build_description(whole).to_json_dict()
    assert "In MXFP8" in capsys.readouterr().out
