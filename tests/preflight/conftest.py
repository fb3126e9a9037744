"""A run of a public model that is planned for hardware other than this machine."""

import pytest

from fixtures.script import Script
from verl.config import load_config
from verl.preflight.check import examine
from verl.preflight.target import Hardware, Target


@pytest.fixture
def examine_on(tmp_path):
    """Return a function that returns the plan and the findings; the model's files do not exist."""
    script = Script(tmp_path)

    def run(model="Qwen3-8B", keys=(), name="npu:ascend950", nodes=None):
        given = script.keys | {"actor_rollout_ref.model.path": f"/models/{model}"} | dict(keys)
        config = load_config([f"{key}={value}" for key, value in given.items()])
        return examine(config, Target(starting=False, hardware=Hardware(name, nodes), without_files=True))

    return run
