"""Where processes run in a cluster of several nodes: raylets of this machine with pretended devices."""

import os

import pytest
import ray
from ray.cluster_utils import Cluster

from verl.config import PPOConfig
from verl.single_controller.placement import place, shared_devices

pytestmark = pytest.mark.e2e


class Asked:
    def where(self):
        return ray.get_runtime_context().get_node_id()

    def device(self):
        return os.environ["CUDA_VISIBLE_DEVICES"]


@pytest.fixture(scope="module")
def nodes():
    """Ids of three nodes with two GPUs each, the driver's first."""
    cluster = Cluster()
    try:
        for _ in range(3):
            cluster.add_node(num_cpus=4, num_gpus=2, include_dashboard=False)
        ray.init(address=cluster.address, log_to_driver=False)
        own = ray.get_runtime_context().get_node_id()
        yield [own, *sorted(node["NodeID"] for node in ray.nodes() if node["NodeID"] != own)]
    finally:
        ray.shutdown()
        cluster.shutdown()


def config(*, ranks, nnodes, trainer_nodes=1, replicas=8, tensor_parallel=1):
    result = PPOConfig()
    result.trainer.n_gpus_per_node, result.trainer.nnodes = ranks, trainer_nodes
    rollout = result.actor_rollout_ref.rollout
    rollout.nnodes, rollout.n_gpus_per_node, rollout.tensor_model_parallel_size = nnodes, replicas, tensor_parallel
    return result


def homes(options):
    return answers(options, "where")


def devices(options):
    return answers(options, "device")


def answers(options, method):
    actors = [ray.remote(**option)(Asked).remote() for option in options]
    found = ray.get([getattr(actor, method).remote() for actor in actors], timeout=60)
    for actor in actors:
        ray.kill(actor)
    return found


def test_on_cpus_trainer_and_replicas_have_nodes_apart(nodes):
    placement = place(config(ranks=2, nnodes=2, replicas=2), "cpu")
    assert homes(placement.trainers) == [nodes[0]] * 2
    assert homes(placement.replicas) == [nodes[1], nodes[1], nodes[2], nodes[2]]


def test_on_cpus_replicas_that_share_stay_with_the_trainer(nodes):
    placement = place(config(ranks=2, nnodes=0), "cpu")
    assert homes(placement.trainers) == homes(placement.replicas) == [nodes[0]] * 2


def test_on_cpus_a_trainer_on_two_nodes_has_replicas_on_both(nodes):
    placement = place(config(ranks=2, nnodes=0, trainer_nodes=2, tensor_parallel=2), "cpu")
    assert homes(placement.trainers) == [nodes[0], nodes[0], nodes[1], nodes[1]]
    assert homes(placement.replicas) == [nodes[0], nodes[1]]


def test_on_devices_a_replica_is_where_its_ranks_are(nodes):
    asked = config(ranks=2, nnodes=0, trainer_nodes=2, tensor_parallel=2)
    placement = place(asked, "cuda")
    try:
        trainers, replicas = homes(placement.trainers), homes(placement.replicas)
        assert trainers[0] == trainers[1] == replicas[0] != trainers[2] == trainers[3] == replicas[1]
        seen = devices(placement.trainers)
        assert shared_devices(asked, "cuda", seen, 1)["CUDA_VISIBLE_DEVICES"] == ",".join(seen[2:])
        assert sorted(seen[2:]) == ["0", "1"]
        assert shared_devices(asked, "cuda", ["5", "7", "4", "6"], 1)["CUDA_VISIBLE_DEVICES"] == "4,6"
        assert shared_devices(asked, "cuda", [None] * 4, 1)["CUDA_VISIBLE_DEVICES"] == "0,1"
    finally:
        placement.release()


def test_more_nodes_than_there_are(nodes):
    with pytest.raises(RuntimeError, match=r"rollout\.nnodes=3: the cluster has 3 node"):
        place(config(ranks=1, nnodes=3, replicas=1), "cpu")


def test_on_devices_each_node_s_replicas_are_together(nodes):
    asked = config(ranks=2, nnodes=2, replicas=2, tensor_parallel=1)
    placement = place(asked, "cuda")
    try:
        trainers, replicas = homes(placement.trainers), homes(placement.replicas)
        assert trainers[0] == trainers[1]
        assert replicas[0] == replicas[1] != replicas[2] == replicas[3]
        assert trainers[0] not in replicas
        assert [option["num_gpus"] for option in placement.replicas] == [1] * 4
        assert shared_devices(asked, "cuda", ["0", "1"], 0) == {}
    finally:
        placement.release()


def test_a_replica_s_devices_are_of_one_node(nodes):
    placement = place(config(ranks=1, nnodes=2, replicas=2, tensor_parallel=2), "cuda")
    try:
        assert [option["num_gpus"] for option in placement.replicas] == [2, 2]
        assert len(set(homes(placement.replicas))) == 2
    finally:
        placement.release()


def test_nodes_that_are_not_there_are_named_and_nothing_stays_reserved(nodes):
    with pytest.raises(RuntimeError, match=r"rollout\.nnodes=4, .*n_gpus_per_node=2: there are not 4 node\(s\)"):
        place(config(ranks=2, nnodes=4, replicas=2), "cuda")
    placement = place(config(ranks=2, nnodes=0, trainer_nodes=3), "cuda")
    placement.release()
