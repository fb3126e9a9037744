"""Hybrid sharding on 4 ranks: two copies of the weights, each on two ranks, train as one copy does."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from fixtures.engine_cases import make_batch
from fixtures.memory_cases import assert_same_training, sent_program, train_program
from fixtures.ranks import run_ranks
from fixtures.tiny import write_tiny_model
from verl.trainer.ppo.batching import split_mini_batches
from verl.workers.engine.mesh import make_mesh

HYBRID = {"fsdp_size": 2}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    # With 127 tokens, the ranks of a copy hold different numbers of rows.
    return str(write_tiny_model(tmp_path_factory.mktemp("model"), kind="qwen3", vocab_size=127))


def shards_of(ranks, size=12):
    return split_mini_batches(make_batch(size), 4, ranks)


def groups_program(rank, sizes):
    """Return, by size, the ranks of this rank's copy, and all ranks."""
    ranks = init_device_mesh("cpu", (dist.get_world_size(),))
    meshes = [make_mesh(ranks, size) for size in sizes]
    return [(dist.get_process_group_ranks(m.shard_group), dist.get_process_group_ranks(m.group)) for m in meshes]


@pytest.mark.slow
def test_neighbors_hold_a_copy(model_dir):
    everyone = [0, 1, 2, 3]
    for rank, found in enumerate(run_ranks(4, groups_program, [-1, 1, 2, 4, 8])):
        neighbors = [0, 1] if rank < 2 else [2, 3]
        assert found == [(shards, everyone) for shards in (everyone, [rank], neighbors, everyone, everyone)]


def test_a_size_that_does_not_divide_the_ranks_is_an_error():
    def program(rank):
        with pytest.raises(ValueError, match="fsdp_size=0: must divide the 1 ranks"):
            make_mesh(init_device_mesh("cpu", (1,)), 0)

    run_ranks(1, program)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 1])
def test_three_steps_equal_those_of_one_copy(model_dir, size):
    """Losses, gradient norms, weights and log-probabilities, with as many samples on each rank."""
    expected = run_ranks(4, train_program, model_dir, shards_of(4), {}, {})
    found = run_ranks(4, train_program, model_dir, shards_of(4), {"fsdp_size": size}, {})
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours.history) == 3 and ours.history[0]["grad_norm"] > 0.1
        assert_same_training(ours, theirs)
        assert ours.history == found[0].history  # every rank knows the sums over all ranks


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(HYBRID, {}), ({}, HYBRID), (HYBRID, {"fsdp_size": 1})])
def test_a_checkpoint_resumes_with_another_size(tmp_path, model_dir, before, after):
    path, shards = str(tmp_path / "checkpoint"), shards_of(4)
    first, second = [rank[:1] for rank in shards], [rank[1:] for rank in shards]
    straight = run_ranks(4, train_program, model_dir, shards, {}, {})
    run_ranks(4, train_program, model_dir, first, before, {}, None, path)
    resumed = run_ranks(4, train_program, model_dir, second, after, {}, path)
    for ours, theirs in zip(resumed, straight, strict=True):
        assert_same_training(ours._replace(log_probs=theirs.log_probs), theirs._replace(history=theirs.history[1:]))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 1])
def test_updates_send_each_row_once(model_dir, size):
    """Full update and delta equal the trainer's weights, and only the ranks of the first copy keep rows."""
    results = run_ranks(4, sent_program, model_dir, {"fsdp_size": size})
    plain = run_ranks(4, sent_program, model_dir, {})
    (first, second, expected, _), (first_plain, *_) = results[0], plain[0]
    assert second.keys() == expected.keys() == first.keys()
    for name, tensor in expected.items():
        assert torch.equal(second[name], tensor) and torch.equal(first[name], first_plain[name]), name
    kept = [rows for *_, rows in results]
    assert kept == ([[64], [63], [], []] if size == 2 else [[127], [], [], []])
