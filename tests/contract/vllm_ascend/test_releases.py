"""The tests below `inside/`, each release's in its own environment and process."""

import os
import subprocess
import sys

import pytest
from contract.vllm_ascend import emulation
from contract.vllm_ascend.build_env import RELEASES, REPOSITORY, build

pytestmark = pytest.mark.contract


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The file that says what the CPU emulation holds, made in a process of its own."""
    output = tmp_path_factory.mktemp("emulation") / "digests.json"
    paths = os.pathsep.join(str(path) for path in (REPOSITORY, REPOSITORY / "tests"))
    variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    done = subprocess.run(
        [sys.executable, emulation.__file__, str(output)], env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return output


@pytest.mark.parametrize("release", RELEASES)
def test_release(release, emulated):
    environment = build(release)
    inside = "tests/contract/vllm_ascend/inside"
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", inside]
    done = environment.run(
        arguments,
        timeout=900,
        capture_output=True,
        text=True,
        cwd=environment.repository,
        env={"CONTRACT_EMULATION": str(emulated)},
    )
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
    print(done.stdout.strip().splitlines()[-1])
