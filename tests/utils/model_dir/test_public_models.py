"""Configs of public models by the name of their directory."""

import pytest
from transformers import AutoConfig

from fixtures.header_checkpoint import tensors_of_config
from verl.utils.model_dir.model_files import model_of_config
from verl.utils.model_dir.public_models import PUBLIC_MODELS, public_config
from verl.utils.model_dir.shapes_from_config import index_of_config


def built(config):
    return {name: shape for name, (shape, _) in tensors_of_config(AutoConfig.for_model(**config)).items()}


@pytest.mark.parametrize("name", PUBLIC_MODELS)
def test_public_models_equal_those_of_transformers(tmp_path, name):
    """With two layers, as all layers are alike."""
    config = public_config(tmp_path / name)
    assert config is not None
    config |= {"num_hidden_layers": 2} | ({"num_experts": 2} if "num_experts" in config else {})
    assert {name: info.shape for name, info in index_of_config(tmp_path, config).tensors.items()} == built(config)


# Parameters in billions, from the pages of the models.
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
def test_parameters_of_public_models(tmp_path, name, billions):
    config = public_config(tmp_path / name)
    assert config is not None
    parameters = model_of_config(tmp_path, config).parameters
    assert parameters is not None
    assert parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_other_names_have_no_config():
    assert public_config("/models/Qwen3-8") is None and public_config("/models/Qwen3-8B/mine") is None


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        ("Qwen3-4B", 40960),
        ("Qwen3-4B-Base", 32768),
        ("Qwen3-4B-Instruct-2507", 262144),
        ("Qwen3-30B-A3B-Thinking-2507", 262144),
        ("Qwen2.5-7B", 131072),
        ("Qwen2.5-7B-Instruct", 32768),
        ("Qwen2.5-3B", 32768),
        ("Qwen2.5-Math-7B", 4096),
    ],
)
def test_positions_of_public_models(name, positions):
    config = public_config(f"/models/{name}")
    assert config is not None and config["max_position_embeddings"] == positions
