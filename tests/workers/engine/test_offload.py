"""An engine whose state is on the host between its phases trains as one that keeps it on the device.

These tests treat the CPU as a device with memory of its own.
"""

import pytest
import torch

from fixtures.engine_cases import make_batch
from fixtures.memory_cases import assert_same_training, train_program, watched_program
from fixtures.ranks import run_ranks
from fixtures.tiny import write_tiny_model
from verl.trainer.ppo.batching import split_mini_batches

WEIGHTS, MOMENTS = {"param_offload": True}, {"optimizer_offload": True}
BOTH = WEIGHTS | MOMENTS


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    # With 127 tokens, two ranks hold different numbers of rows.
    return str(write_tiny_model(tmp_path_factory.mktemp("model"), kind="qwen3", vocab_size=127))


def shards_of(ranks):
    return split_mini_batches(make_batch(12), 4, ranks)


@pytest.mark.parametrize(
    ("ranks", "keys", "model"),
    [
        (1, BOTH, {}),
        pytest.param(1, WEIGHTS, {"lora_rank": 4}, marks=pytest.mark.slow),
        pytest.param(2, BOTH, {"enable_gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param(2, WEIGHTS, {}, marks=pytest.mark.slow),
        pytest.param(2, MOMENTS, {}, marks=pytest.mark.slow),
    ],
)
def test_three_steps_equal_those_without_offloading(model_dir, ranks, keys, model):
    expected = run_ranks(ranks, train_program, model_dir, shards_of(ranks), {}, model)
    found = run_ranks(ranks, train_program, model_dir, shards_of(ranks), keys, model)
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours.history) == 3 and ours.history[0]["grad_norm"] > 0.1
        assert_same_training(ours, theirs)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("weights", "moments", "model"),
    [
        (True, True, {}),
        pytest.param(True, False, {}, marks=pytest.mark.slow),
        pytest.param(False, True, {}, marks=pytest.mark.slow),
        pytest.param(True, True, {"lora_rank": 4}, marks=pytest.mark.slow),
    ],
)
def test_offloaded_state_is_on_the_device_only_while_it_is_used(tmp_path, model_dir, ranks, weights, moments, model):
    keys = {"param_offload": weights, "optimizer_offload": moments}
    path = str(tmp_path / "checkpoint")
    for found in run_ranks(ranks, watched_program, model_dir, shards_of(ranks), keys, model, path):
        size = max(held.weights for held in found)
        both = max(held.moments for held in found)
        assert size > 1000 and both > 100
        updated = False
        for held in found:
            passes = held.when in ("log_probs", "forward_backward", "backward", "export")
            in_update = held.when in ("forward_backward", "backward", "after forward_backward", "after optimizer_step")
            assert held.weights == (size if passes or in_update or not weights else 0), held.when
            updated = updated or held.when == "after optimizer_step"
            assert held.moments == (both if updated and (in_update or not moments) else 0), held.when
        assert {held.when for held in found} > {"backward", "export", "after save", "after load", "after export_hf"}


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(BOTH, {}), ({}, BOTH)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_resumes_with_and_without_offloading(tmp_path, model_dir, ranks, before, after):
    path, shards = str(tmp_path / "checkpoint"), shards_of(ranks)
    first, second = [rank[:1] for rank in shards], [rank[1:] for rank in shards]
    straight = run_ranks(ranks, train_program, model_dir, shards, {}, {})
    run_ranks(ranks, train_program, model_dir, first, before, {}, None, path)
    resumed = run_ranks(ranks, train_program, model_dir, second, after, {}, path)
    for ours, theirs in zip(resumed, straight, strict=True):
        assert ours.history == theirs.history[1:]
        assert all(torch.equal(ours.weights[name], tensor) for name, tensor in theirs.weights.items())
