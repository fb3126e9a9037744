"""Fixtures of the end-to-end tests, and the order in which two workers of pytest-xdist take them."""

import os
from pathlib import Path

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from fixtures.engine import SharedEngines
from fixtures.tiny import write_tiny_model
from fixtures.training import TEN_STEPS, TinyRun
from verl.utils.host import thread_environment

HERE = Path(__file__).parent

# Tests that kill processes, or that check which processes and files in /dev/shm a run leaves. They run one after
# another in one worker of pytest-xdist, as each could see what another leaves.
PROCESSES = ("test_start_and_stop", "test_rollout_lag", "test_replicas")
# The order in which the workers take the modules, the longest first; the rest follows.
LONGEST = ("test_benchmarks", "test_algorithms", "test_engine_delta", "test_training", "test_partial_rollouts")


def pytest_collection_modifyitems(items):
    """Keep each module in one worker, so that its tests share what they start, and put the longest modules first."""
    ours = [item for item in items if item.path.parent == HERE]
    for item in ours:
        module = item.path.stem
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group("processes" if module in PROCESSES else module))
    first = (*PROCESSES, *LONGEST)
    place = {module: number for number, module in enumerate(first)}
    ours.sort(key=lambda item: place.get(item.path.stem, len(first)))
    rest = [item for item in items if item.path.parent != HERE]
    items[:] = rest + ours


@pytest.fixture(scope="session", autouse=True)
def one_thread_for_each_engine():
    """Give engines in this process, and their workers, one thread each that no core is reserved for.

    Two tests run at a time on the same cores, and the models are too small for more threads to help.
    """
    torch.set_num_threads(1)
    os.environ |= {**thread_environment(1), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@pytest.fixture(scope="module")
def engines():
    """Engines that the tests of a module share; see `SharedEngines`."""
    shared = SharedEngines()
    yield shared
    shared.close()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """`tiny_models(count, **options)`: directories of models with the seeds 0, 1, ...; written once, so only read them.

    `options` are those of `write_tiny_model`.
    """
    written = {}

    def write(count, **options):
        directories = []
        for seed in range(count):
            key = seed, tuple(sorted(options.items()))
            if key not in written:
                written[key] = write_tiny_model(tmp_path_factory.mktemp("model"), seed=seed, **options)
            directories.append(written[key])
        return directories

    return write


@pytest.fixture(scope="session")
def ray_address():
    """Address of a Ray cluster that several runs join one after another, which saves each of them the start of Ray."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield cluster.address
    cluster.shutdown()


@pytest.fixture
def ray_session(ray_address):
    """Connect this process to the cluster at `ray_address`."""
    ray.init(address=ray_address, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def reference(tmp_path_factory, ray_address):
    """A run of ten steps with one rank and one replica, seeded, which nothing interrupts."""
    run = TinyRun(tmp_path_factory.mktemp("reference"), ray_address)
    run.run(**TEN_STEPS, **run.seeded(), trainer__rollout_data_dir=run.root / "dumps")
    return run
