"""A config.json with values that no model has, as `verl check` and `verl describe` read it."""

import json

import pytest

from verl.utils.model_dir.config_fields import config_problem
from verl.utils.model_dir.errors import ModelFilesError
from verl.utils.model_dir.index import read_model_config
from verl.utils.model_dir.model_files import read_config_alone

GOOD = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "intermediate_size": [6144, 12288],
    "vocab_size": 151_936,
    "num_experts": 0,
    "rope_scaling": None,
}


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("num_hidden_layers", ["four", None, 0, -1, 1.5, True, 10**9, [4, "a"], []], "a whole number from 1 to 10000"),
        ("num_attention_heads", [0, {}, 10**9], "a whole number from 1 to 65536"),
        ("vocab_size", [0, "x"], "a whole number from 1 to 134217728"),
        ("model_type", [3, ["qwen3"]], "text"),
        ("tie_word_embeddings", ["yes", 1], "true or false"),
        ("quantization_config", ["fp8", [1]], "an object"),
        ("architectures", ["Qwen3ForCausalLM", [3]], "a list of text"),
        ("layer_types", ["full_attention", [None]], "a list of text"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "text_config."])
def test_values_that_no_model_has_are_named(tmp_path, prefix, name, values, expected):
    for value in values:
        config = {**GOOD, "text_config": {name: value}} if prefix else {**GOOD, name: value}
        problem = config_problem(config)
        assert problem == f"{prefix}{name}={value!r}: must be {expected}; correct it"
        (tmp_path / "config.json").write_text(json.dumps(config))
        for read, error in ((read_config_alone, ModelFilesError), (read_model_config, ValueError)):
            with pytest.raises(error) as caught:
                read(tmp_path)
            assert str(caught.value).endswith(f"config.json: {problem}")


def test_a_config_of_a_model_has_no_problem(tmp_path):
    assert config_problem(GOOD) is None
    assert config_problem({**GOOD, "text_config": GOOD, "unknown": [None]}) is None
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    assert read_model_config(tmp_path) == GOOD == read_config_alone(tmp_path).whole_config


def test_a_config_that_is_nested_too_deeply_is_damaged(tmp_path):
    (tmp_path / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(ModelFilesError, match=r"config\.json is damaged"):
        read_config_alone(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json: nested too deeply"):
        read_model_config(tmp_path)
