"""Fixtures: checkpoints and schemes."""

import pytest
from safetensors.torch import load_file

from fixtures.scheme_models import FP8_SIZES, PARTIAL_BLOCKS, rollout
from fixtures.tiny import write_tiny_model
from verl.workers.rollout.quantization import get_scheme


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("dense"), **PARTIAL_BLOCKS)


@pytest.fixture(scope="session")
def experts(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("experts"), kind="qwen3_moe")


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("wide"), **FP8_SIZES)


@pytest.fixture
def scheme():
    """Build the scheme of a value of `rollout.quantization` for the checkpoint of a directory."""
    return lambda name, model_dir: get_scheme(rollout(name), str(model_dir))


@pytest.fixture
def weights_of():
    """Load the weights of a directory."""
    return lambda model_dir: load_file(model_dir / "model.safetensors")
