"""Checkpoints: a resumed run equals an uninterrupted run, also with another number of ranks."""

import json

import pytest
import torch

from fixtures.engine_cases import actor_config, checkpoint_program, make_batch, make_engine, optim_config
from fixtures.ranks import run_ranks
from fixtures.tiny import write_tiny_model
from verl.trainer.ppo.batching import split_mini_batches


@pytest.fixture(scope="module", params=["qwen3", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def model_dir(request, tmp_path_factory):
    # With 127 tokens, two ranks hold different numbers of rows.
    return str(write_tiny_model(tmp_path_factory.mktemp(request.param), kind=request.param, vocab_size=127))


@pytest.fixture(scope="module")
def actor():
    optim = optim_config(lr=1e-3, lr_warmup_steps=2, lr_scheduler_type="cosine")
    return actor_config(optim=optim)


def shards_of(ranks):
    return split_mini_batches(make_batch(12), 3, ranks)


def halves(shards):
    return [rank[:2] for rank in shards], [rank[2:] for rank in shards]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_run_bit_for_bit(tmp_path, model_dir, actor, ranks):
    shards = shards_of(ranks)
    first, second = halves(shards)
    path = str(tmp_path / "checkpoint")
    begun = run_ranks(ranks, checkpoint_program, model_dir, first, actor, None, path)
    resumed = run_ranks(ranks, checkpoint_program, model_dir, second, actor, path, None)
    straight = run_ranks(ranks, checkpoint_program, model_dir, shards, actor, None, None)
    for (a, *_), (b, weights, *_), (whole, expected, *_) in zip(begun, resumed, straight, strict=True):
        assert a + b == whole
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_checkpoint_loads_with_another_number_of_ranks(tmp_path, model_dir, actor, before, after):
    path = str(tmp_path / "checkpoint")
    first, _ = halves(shards_of(before))
    _, second = halves(shards_of(after))
    _, saved, *_ = run_ranks(before, checkpoint_program, model_dir, first, actor, None, path)[0]
    nothing = [[] for _ in range(after)]
    _, loaded, *_ = run_ranks(after, checkpoint_program, model_dir, nothing, actor, path, None)[0]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
    resumed = run_ranks(after, checkpoint_program, model_dir, second, actor, path, None)[0][0]
    straight = run_ranks(1, checkpoint_program, model_dir, shards_of(1), actor, None, None)[0][0]
    for metrics, expected in zip(resumed, straight[2:], strict=True):
        assert metrics["lr"] == expected["lr"]
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("ranks", [1, 2])
def test_random_number_generators_are_restored(tmp_path, model_dir, actor, ranks):
    """Each rank draws the same numbers after the load as after the save, and other numbers than the other ranks."""
    path = str(tmp_path / "checkpoint")
    nothing = [[] for _ in range(ranks)]
    saved = run_ranks(ranks, checkpoint_program, model_dir, nothing, actor, None, path)
    loaded = run_ranks(ranks, checkpoint_program, model_dir, nothing, actor, path, None)
    assert [after_load for *_, after_load, _ in loaded] == [after_save for *_, after_save in saved]
    assert len({tuple(after_load) for *_, after_load, _ in loaded}) == ranks


def test_errors_name_a_missing_or_unknown_part(tmp_path, model_dir, actor):
    def program(rank):
        engine = make_engine(model_dir, actor=actor)
        engine.save(tmp_path / "some", ["model"])
        engine.load(tmp_path / "some", ["model"])
        with pytest.raises(FileNotFoundError, match=r"has no optimizer: remove 'optimizer' from .*load_contents"):
            engine.load(tmp_path / "some")
        with pytest.raises(ValueError, match="unknown part 'weights'"):
            engine.save(tmp_path / "other", ["weights"])

    run_ranks(1, program)
    assert not (tmp_path / "some" / "engine.json").exists()


def test_files_of_a_checkpoint(tmp_path, model_dir, actor):
    first, _ = halves(shards_of(2))
    run_ranks(2, checkpoint_program, model_dir, first, actor, None, str(tmp_path / "c"))
    assert json.loads((tmp_path / "c" / "engine.json").read_text()) == {
        "format": 1,
        "world_size": 2,
        "schedule_step": 2,
    }
    assert {path.name for path in (tmp_path / "c").iterdir()} == {
        "engine.json",
        "model",
        "optimizer",
        "rng_rank_0.pt",
        "rng_rank_1.pt",
    }
