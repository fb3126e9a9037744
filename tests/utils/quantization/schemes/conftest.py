"""Fixtures: checkpoints and weight formats."""

import pytest

from fixtures.scheme_models import FP8_SIZES, PARTIAL_BLOCKS, rollout
from fixtures.tiny import write_tiny_model
from verl.utils.quantization.schemes import weight_format


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
def make():
    """Build the weight format of a value of `rollout.quantization`, for a directory and other keys of `rollout`."""
    return lambda name, model_dir, **over: weight_format(rollout(name, **over), str(model_dir))
