"""Fixtures: checkpoints and weight formats."""

import pytest

from fixtures.scheme_models import dense, experts, rollout, wide  # noqa: F401  (fixtures)
from verl.utils.quantization.schemes import weight_format


@pytest.fixture
def make():
    """Build the weight format of a value of `rollout.quantization`, for a directory and other keys of `rollout`."""
    return lambda name, model_dir, **over: weight_format(rollout(name, **over), str(model_dir))
