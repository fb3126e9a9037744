"""Sizes of config.json beside the shapes of the weights."""

import json

import pytest

from fixtures.header_checkpoint import write_header_checkpoint
from verl.utils.model_dir.errors import ModelFilesError
from verl.utils.model_dir.model_files import read_model
from verl.utils.model_dir.shapes_from_config import index_of_config
from verl.utils.model_dir.weight_shapes import contradiction

CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "num_experts": 2,
    "mlp_only_layers": [0],
}


def shapes_of(directory, **changes):
    return {name: info.shape for name, info in index_of_config(directory, CONFIG | changes).tensors.items()}


@pytest.mark.parametrize(
    ("field", "value", "tensor", "shape"),
    [
        ("hidden_size", 32, "model.embed_tokens.weight", [128, 64]),
        ("vocab_size", 100, "model.embed_tokens.weight", [128, 64]),
        ("vocab_size", 100, "lm_head.weight", [128, 64]),
        ("intermediate_size", 128, "model.layers.0.mlp.gate_proj.weight", [96, 64]),
        ("intermediate_size", 128, "model.layers.0.mlp.down_proj.weight", [64, 96]),
        ("hidden_size", 32, "model.norm.weight", [64]),
    ],
)
def test_a_size_that_no_weight_has_is_named(tmp_path, field, value, tensor, shape):
    shapes = shapes_of(tmp_path)
    assert contradiction(CONFIG, shapes) is None
    size = CONFIG[field]
    expected = f"{field}={value}, but {tensor} has the shape {shape}, which needs {field}={size}"
    assert contradiction(CONFIG | {field: value}, {tensor: shapes[tensor]}) == expected


@pytest.mark.parametrize("layers", [1, 2, 4, 30])
def test_another_number_of_layers_is_named(tmp_path, layers):
    found = contradiction(CONFIG | {"num_hidden_layers": layers}, shapes_of(tmp_path))
    assert found.startswith(
        f"num_hidden_layers={layers}, but the weights have 3 layers, the last one with model.layers.2."
    )


def test_layers_that_predict_further_ahead_are_no_contradiction(tmp_path):
    shapes = shapes_of(tmp_path, num_hidden_layers=4)
    assert contradiction(CONFIG, shapes) is not None
    assert contradiction(CONFIG | {"num_nextn_predict_layers": 1}, shapes) is None


def test_other_forms_of_weights_are_not_judged(tmp_path):
    wrong = CONFIG | {"hidden_size": 32}
    assert contradiction(wrong | {"quantization_config": {"quant_method": "awq"}}, shapes_of(tmp_path)) is None
    assert contradiction(wrong, {"a": (3,), "model.embed_tokens.weight": ()}) is None
    assert contradiction({}, shapes_of(tmp_path)) is None
    widths = CONFIG | {"intermediate_size": [96, 64, 32]}
    assert contradiction(widths, shapes_of(tmp_path)) is None


def test_a_model_directory_with_a_contradiction_is_refused(tmp_path):
    tensors = {name: (info.shape, info.dtype) for name, info in index_of_config(tmp_path, CONFIG).tensors.items()}
    write_header_checkpoint(tmp_path, CONFIG, tensors, shards=2)
    assert read_model(tmp_path).layers == 3
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"intermediate_size": 128}))
    with pytest.raises(ModelFilesError, match=r"config.json has intermediate_size=128, but .*; copy config.json and"):
        read_model(tmp_path)
