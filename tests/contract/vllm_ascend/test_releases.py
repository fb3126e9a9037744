"""The tests below `inside/`, each release's in its own environment and process."""

import pytest
from contract.vllm_ascend.build_env import RELEASES, build

pytestmark = pytest.mark.contract


@pytest.mark.parametrize("release", RELEASES)
def test_release(release):
    environment = build(release)
    inside = "tests/contract/vllm_ascend/inside"
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", inside]
    done = environment.run(arguments, timeout=900, capture_output=True, text=True, cwd=environment.repository)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
