"""Runs the tests below `inside/` for each release, in its own environment and process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from contract.vllm_ascend import emulation
from contract.vllm_ascend.build_env import RELEASES, REPOSITORY, build

from fixtures.tiny import write_tiny_model
from verl.utils.vllm.npu_settings import npu_environment

NPU_PLATFORM = Path(__file__).with_name("npu_platform.py")
pytestmark = pytest.mark.contract


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """Write the file with the parameters of the CPU emulation, in a separate process."""
    output = tmp_path_factory.mktemp("emulation") / "digests.json"
    paths = os.pathsep.join(str(path) for path in (REPOSITORY, REPOSITORY / "tests"))
    variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    done = subprocess.run(
        [sys.executable, emulation.__file__, str(output)], env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return output


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("release", RELEASES)
def test_release_passes_its_tests(release, emulated):
    environment = build(release)
    inside = "tests/contract/vllm_ascend/inside"
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", inside]
    done = environment.run(
        arguments,
        timeout=1500,
        capture_output=True,
        text=True,
        cwd=environment.repository,
        env={"CONTRACT_EMULATION": str(emulated), "CONTRACT_RESULTS": "1"},
    )
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-4000:]}"


@pytest.mark.feature("platform")
@pytest.mark.parametrize("release", RELEASES)
def test_engine_configuration_on_the_platform_of_the_release(release, tmp_path):
    """With the entry points of vllm-ascend, as in an installation: platform, configuration, and verl's plugin."""
    directory = write_tiny_model(tmp_path)
    done = build(release).run(
        [str(NPU_PLATFORM), str(directory)],
        npu_platform=True,
        env={"VLLM_PLUGINS": "ascend,verl", **npu_environment({}, release)},
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert json.loads(done.stdout.strip().splitlines()[-1]) == {
        "device_type": "npu",
        "quant_config": "AscendModelSlimConfig",
        "is_mxfp8_vllm_ascend": True,
        "worker": "vllm_ascend.worker.worker.NPUWorker",
        "extension": "verl.workers.rollout.vllm_rollout.worker_extension.WeightUpdateExtension",
        "sleep_mode": True,
        "weight_nz_mode": None if release == "0.18.0" else 0,
        "patched again": [],
    }


@pytest.mark.parametrize("release", RELEASES)
def test_npu_tests_of_operators_and_trainer_run_on_the_stand_in(release):
    """They call existing operators with valid arguments."""
    environment = build(release)
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/npu", "-k", "product or trainer"]
    done = environment.run(arguments, timeout=300, capture_output=True, text=True, cwd=environment.repository)
    assert done.returncode == 0 and "6 passed" in done.stdout, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
