"""Runs on two nodes: two raylets on this machine, which the run treats as machines without shared memory."""

import json

import pytest
from ray.cluster_utils import Cluster

from fixtures.training import TinyRun

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
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
        # In float32 every weight changes in a step, so that auto would soon send full updates only.
        actor_rollout_ref__rollout__checkpoint_engine__delta="on",
    )
    data = run.metrics()
    assert sorted(data) == [1, 2]
    # A full update first, then a delta.
    assert [data[step]["weight_update/delta"] for step in (1, 2)] == [0.0, 1.0]
    assert all(data[step]["training/rollout_probs_diff_max"] < 1e-4 for step in data)


def test_a_checkpoint_of_two_nodes_resumes_on_one(tmp_path, cluster, ray_address):
    """A rank and a replica on each node save a checkpoint; two ranks on one node resume from it."""
    run = TinyRun(tmp_path, ray_address)
    run.run(
        **{"+ray_kwargs__ray_init__address": cluster.address},
        trainer__nnodes=2,
        trainer__save_freq=1,
    )
    data = run.metrics()
    assert sorted(data) == [1, 2]
    # The engines on both nodes have the trainer's weights.
    assert all(data[step]["training/rollout_probs_diff_max"] < 1e-4 for step in data)
    manifest = run.out / "global_step_2" / "manifest.json"
    assert {f"actor/rng_rank_{rank}.pt" for rank in (0, 1)} < set(json.loads(manifest.read_text())["files"])

    run.run(trainer__n_gpus_per_node=2, trainer__total_training_steps=3)
    assert run.metrics()[3]["training/rollout_probs_diff_max"] < 1e-4
