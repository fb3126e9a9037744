"""NonFiniteError: it is raised on all ranks before a weight changes, and lists the samples involved."""

import pickle

import pytest

from fixtures.engine_cases import failure_program, make_batch
from fixtures.ranks import run_ranks
from fixtures.tiny import write_tiny_model
from verl.trainer.ppo.batching import split_mini_batches
from verl.workers.engine import MicroBatching, NonFiniteError


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return str(write_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("limits", [MicroBatching(size=1), MicroBatching(size=100)])
def test_a_non_finite_loss_stops_all_ranks(model_dir, ranks, limits):
    data = make_batch(12)
    data.batch["advantages"][4] = 99.0  # the program replaces this value by NaN
    shards = [rank[0] for rank in split_mini_batches(data, 12, ranks)]
    for quantity, step, uids, unchanged, works in run_ranks(ranks, failure_program, model_dir, shards, limits, "loss"):
        assert (quantity, step) == ("loss", 7)
        assert unchanged and works
        if limits.size == 1:
            assert uids == ["prompt-2"]
        else:
            assert "prompt-2" in uids


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_non_finite_gradient_stops_all_ranks(model_dir, ranks):
    """Only the last rank's shard of the gradient is infinite; the error lists the whole mini-batch."""
    shards = [rank[0] for rank in split_mini_batches(make_batch(6), 6, ranks)]
    limits = MicroBatching(size=2)
    outcomes = run_ranks(ranks, failure_program, model_dir, shards, limits, "gradient")
    for quantity, step, uids, unchanged, works in outcomes:
        assert (quantity, step) == ("gradient norm", 7)
        assert uids == ["prompt-0", "prompt-1", "prompt-2"]
        assert unchanged and works


def test_the_error_can_be_pickled_and_shortens_long_lists():
    error = NonFiniteError("loss", 3, [f"u{i}" for i in range(20)])
    again = pickle.loads(pickle.dumps(error))
    assert (again.quantity, again.global_step, again.uids) == ("loss", 3, error.uids)
    assert str(again) == str(error)
    assert "global_step=3" in str(error) and "u15 and 4 more" in str(error)
    assert "unknown" in str(NonFiniteError("loss", None, []))
