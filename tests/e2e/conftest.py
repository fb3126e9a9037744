"""Fixtures of the end-to-end tests, and the order in which two workers of pytest-xdist take them."""

import os

import pytest
import torch

from fixtures.engine import SharedEngines
from fixtures.tiny import write_tiny_model
from verl.utils.platform import thread_environment


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
