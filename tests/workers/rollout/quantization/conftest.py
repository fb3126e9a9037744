"""Fixtures: checkpoints and schemes."""

import pytest
from safetensors.torch import load_file

from fixtures.scheme_models import dense, experts, rollout, wide  # noqa: F401  (fixtures)
from verl.workers.rollout.quantization import get_scheme


@pytest.fixture
def scheme():
    """Build the scheme of a value of `rollout.quantization` for a directory and other keys of `rollout`."""
    return lambda name, model_dir, **over: get_scheme(rollout(name, **over), str(model_dir))


@pytest.fixture
def weights_of():
    """Load the weights of a directory."""
    return lambda model_dir: load_file(model_dir / "model.safetensors")
