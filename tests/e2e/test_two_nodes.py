"""Trainer and replica on two nodes: two raylets of this machine, which share no memory as far as the run knows."""

import pytest
from ray.cluster_utils import Cluster

from fixtures.training import TinyRun

pytestmark = pytest.mark.e2e


@pytest.fixture
def cluster():
    started = Cluster()
    try:
        for _ in range(2):
            started.add_node(num_cpus=4, include_dashboard=False)
        yield started
    finally:
        started.shutdown()


def test_weights_reach_a_replica_on_another_node(tmp_path, cluster):
    run = TinyRun(tmp_path)
    run.run(
        **{"+ray_kwargs__ray_init__address": cluster.address},
        actor_rollout_ref__rollout__nnodes=1,
        actor_rollout_ref__rollout__n_gpus_per_node=1,
        actor_rollout_ref__rollout__checkpoint_engine__backend="gloo",
        # In float32 every weight changes in a step, which auto would not send as changes for long.
        actor_rollout_ref__rollout__checkpoint_engine__delta="on",
    )
    data = run.metrics()
    assert sorted(data) == [1, 2]
    # Whole at first, then what changed alone.
    assert [data[step]["weight_update/delta"] for step in (1, 2)] == [0.0, 1.0]
    assert all(data[step]["training/rollout_probs_diff_max"] < 1e-4 for step in data)
