import models
import pytest
import shapes
from transformers import Qwen2Config


def linear_layers(hidden, inner, heads, kv, head_dim=128):
    return hidden * heads * head_dim * 2 + hidden * kv * head_dim * 2 + 3 * hidden * inner


def test_counts_of_a_dense_model_equal_a_calculation_by_hand():
    counts = shapes.count(shapes.PUBLIC["Qwen3-8B"])
    quantized = 36 * linear_layers(4096, 12288, 32, 8)
    plain = 2 * 151936 * 4096 + 36 * (2 * 4096 + 2 * 128) + 4096
    assert counts.parameters == quantized + plain == 8_190_735_360
    assert counts.mxfp8_bytes == quantized * 33 // 32 + 2 * plain
    assert counts.body == quantized
    assert counts.head == 151936 * 4096
    assert counts.kv_elements == 2 * 36 * 8 * 128
    assert counts.experts == 0


def test_counts_of_a_model_with_experts_equal_a_calculation_by_hand():
    counts = shapes.count(shapes.PUBLIC["Qwen3-30B-A3B"])
    experts = 48 * 128 * 3 * 2048 * 768
    attention = 48 * (2048 * 4096 * 2 + 2048 * 512 * 2)
    router = 48 * 128 * 2048
    plain = 2 * 151936 * 2048 + router + 48 * (2 * 2048 + 2 * 128) + 2048
    assert counts.experts == experts
    assert counts.parameters == experts + attention + plain
    assert counts.mxfp8_bytes == (experts + attention) * 33 // 32 + 2 * plain
    assert counts.body == attention + router + experts // 16


@pytest.mark.parametrize(("name", "billions"), [("Qwen3-32B", 32.8), ("Qwen3-235B-A22B", 235.1)])
def test_parameter_counts_match_the_model_names(name, billions):
    assert shapes.count(shapes.PUBLIC[name]).parameters / 1e9 == pytest.approx(billions, abs=0.05)


def test_a_tied_head_counts_once():
    counts = shapes.count(models.config("0.8M"))
    assert counts.parameters == models.parameters("0.8M")
    assert counts.unquantized_bytes(4) == 4 * counts.parameters
    assert counts.head == 128 * 128


def test_biases_are_not_quantized():
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=True,
    )
    counts = shapes.count(config)
    quantized = 2 * linear_layers(64, 128, heads=2, kv=1, head_dim=32)
    plain = 64 * 64 + 2 * (2 * 64 + 64 + 2 * 32) + 64
    assert counts.parameters == quantized + plain
    assert counts.mxfp8_bytes == quantized * 33 // 32 + 2 * plain
