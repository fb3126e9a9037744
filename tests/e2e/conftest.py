"""Fixtures of the end-to-end tests, and the order in which two workers of pytest-xdist take them."""

import os
from pathlib import Path

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from fixtures.engine import SharedEngines
from fixtures.tiny import write_tiny_model
from verl.utils.host import thread_environment

HERE = Path(__file__).parent

# Modules that kill processes, or check which processes and files in /dev/shm a run leaves. They run one after another
# in one worker, because each could see files of another: vLLM with tensor parallelism (test_training) may leave one.
PROCESSES = (
    *("test_start_and_stop", "test_rollout_lag", "test_fully_async", "test_replicas", "test_reliability"),
    *("test_training", "test_campaign"),
)
# The next modules, the longest first; the others follow.
LONGEST = ("test_benchmarks", "test_algorithms", "test_two_nodes", "test_engine_two_ranks")


def pytest_collection_modifyitems(items):
    """Put the longest modules first, so that the workers of pytest-xdist end at about the same time."""
    order = {module: number for number, module in enumerate((*PROCESSES, *LONGEST))}
    ours = sorted(
        (item for item in items if item.path.parent == HERE), key=lambda item: order.get(item.path.stem, len(order))
    )
    items[:] = [item for item in items if item.path.parent != HERE] + ours


def pytest_xdist_make_scheduler(config, log):
    """Give each worker of pytest-xdist whole modules, whose tests share what they start."""
    from xdist.scheduler import LoadScopeScheduling

    class ModuleScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            module = Path(nodeid.partition("::")[0]).stem
            return "processes" if module in PROCESSES else module

    config.option.loadscopereorder = False  # it would put modules with many tests first
    return ModuleScheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def one_thread_for_each_engine():
    """Give engines in this process, and their workers, one thread each that is not bound to a core.

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
