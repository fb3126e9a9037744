"""Placement in a cluster of several nodes: Ray nodes on this machine with simulated devices."""

import os

import pytest
import ray
from ray.cluster_utils import Cluster

from verl.config import PPOConfig
from verl.single_controller.placement import place_processes, shared_devices

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


class Probe:
    def node_id(self):
        return ray.get_runtime_context().get_node_id()

    def devices(self):
        return os.environ["CUDA_VISIBLE_DEVICES"]


@pytest.fixture(scope="module")
def nodes():
    """Ids of three nodes with two GPUs each, the driver's node first."""
    cluster = Cluster()
    try:
        for _ in range(3):
            cluster.add_node(num_cpus=4, num_gpus=2, include_dashboard=False)
        ray.init(address=cluster.address, log_to_driver=False)
        driver = ray.get_runtime_context().get_node_id()
        yield [driver, *sorted(node["NodeID"] for node in ray.nodes() if node["NodeID"] != driver)]
    finally:
        ray.shutdown()
        cluster.shutdown()


def make_config(*, ranks, nnodes, trainer_nodes=1, replicas=8, tensor_parallel=1):
    config = PPOConfig()
    config.trainer.n_gpus_per_node, config.trainer.nnodes = ranks, trainer_nodes
    rollout = config.actor_rollout_ref.rollout
    rollout.nnodes, rollout.n_gpus_per_node, rollout.tensor_model_parallel_size = nnodes, replicas, tensor_parallel
    return config


def node_ids(options):
    return call_probes(options, "node_id")


def visible_devices(options):
    return call_probes(options, "devices")


def call_probes(options, method):
    actors = [ray.remote(**option)(Probe).remote() for option in options]
    results = ray.get([getattr(actor, method).remote() for actor in actors], timeout=60)
    for actor in actors:
        ray.kill(actor)
    return results


def test_on_cpu_standalone_replicas_use_other_nodes_than_the_trainer(nodes):
    placement = place_processes(make_config(ranks=2, nnodes=2, replicas=2), "cpu")
    assert node_ids(placement.trainers) == [nodes[0]] * 2
    assert node_ids(placement.replicas) == [nodes[1], nodes[1], nodes[2], nodes[2]]


def test_on_cpu_hybrid_replicas_use_the_trainer_node(nodes):
    placement = place_processes(make_config(ranks=2, nnodes=0), "cpu")
    assert node_ids(placement.trainers) == node_ids(placement.replicas) == [nodes[0]] * 2


def test_on_cpu_a_trainer_on_two_nodes_has_replicas_on_both(nodes):
    placement = place_processes(make_config(ranks=2, nnodes=0, trainer_nodes=2, tensor_parallel=2), "cpu")
    assert node_ids(placement.trainers) == [nodes[0], nodes[0], nodes[1], nodes[1]]
    assert node_ids(placement.replicas) == [nodes[0], nodes[1]]


def test_on_gpus_a_hybrid_replica_runs_on_the_node_of_its_ranks(nodes):
    config = make_config(ranks=2, nnodes=0, trainer_nodes=2, tensor_parallel=2)
    placement = place_processes(config, "cuda")
    try:
        trainers, replicas = node_ids(placement.trainers), node_ids(placement.replicas)
        assert trainers[0] == trainers[1] == replicas[0] != trainers[2] == trainers[3] == replicas[1]
        devices = visible_devices(placement.trainers)
        assert shared_devices(config, "cuda", devices, 1)["CUDA_VISIBLE_DEVICES"] == ",".join(devices[2:])
        assert sorted(devices[2:]) == ["0", "1"]
        assert shared_devices(config, "cuda", ["5", "7", "4", "6"], 1)["CUDA_VISIBLE_DEVICES"] == "4,6"
        assert shared_devices(config, "cuda", [None] * 4, 1)["CUDA_VISIBLE_DEVICES"] == "0,1"
    finally:
        placement.release()


def test_too_many_cpu_nodes_raise_an_error_with_the_node_count(nodes):
    with pytest.raises(RuntimeError, match=r"rollout\.nnodes=3: the cluster has 3 node"):
        place_processes(make_config(ranks=1, nnodes=3, replicas=1), "cpu")


def test_on_gpus_the_replicas_of_a_node_are_placed_together(nodes):
    config = make_config(ranks=2, nnodes=2, replicas=2, tensor_parallel=1)
    placement = place_processes(config, "cuda")
    try:
        trainers, replicas = node_ids(placement.trainers), node_ids(placement.replicas)
        assert trainers[0] == trainers[1]
        assert replicas[0] == replicas[1] != replicas[2] == replicas[3]
        assert trainers[0] not in replicas
        assert [option["num_gpus"] for option in placement.replicas] == [1] * 4
        assert shared_devices(config, "cuda", ["0", "1"], 0) == {}
    finally:
        placement.release()


def test_all_devices_of_a_replica_are_on_one_node(nodes):
    placement = place_processes(make_config(ranks=1, nnodes=2, replicas=2, tensor_parallel=2), "cuda")
    try:
        assert [option["num_gpus"] for option in placement.replicas] == [2, 2]
        assert len(set(node_ids(placement.replicas))) == 2
    finally:
        placement.release()


def test_a_failed_reservation_names_the_keys_and_reserves_nothing(nodes, monkeypatch):
    monkeypatch.setattr("verl.single_controller.placement._RESERVATION_TIMEOUT_S", 3)
    with pytest.raises(RuntimeError, match=r"rollout\.nnodes=4, .*n_gpus_per_node=2: there are not 4 node\(s\)"):
        place_processes(make_config(ranks=2, nnodes=4, replicas=2), "cuda")
    placement = place_processes(make_config(ranks=2, nnodes=0, trainer_nodes=3), "cuda")
    placement.release()
