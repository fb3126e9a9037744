"""Fixtures: checkpoints and schemes."""

import pytest
from safetensors.torch import load_file

from fixtures.scheme_models import dense, experts, rollout, wide  # noqa: F401  (fixtures)
from verl.workers.rollout.quantization import get_scheme


@pytest.fixture
def scheme():
    """Build the scheme of a value of `rollout.quantization` for the checkpoint of a directory."""
    return lambda name, model_dir: get_scheme(rollout(name), str(model_dir))


@pytest.fixture
def weights_of():
    """Load the weights of a directory."""
    return lambda model_dir: load_file(model_dir / "model.safetensors")
