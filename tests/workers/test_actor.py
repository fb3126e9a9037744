"""The actor worker on one and two ranks: columns, metrics, epochs, checkpoints, bypass mode, token selection."""

import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from fixtures.engine_cases import (
    actor_config,
    bypass_program,
    fsdp_config,
    make_batch,
    make_worker,
    optim_config,
    pieces_program,
    selecting_program,
    worker_checkpoint_program,
    worker_config,
    worker_program,
)
from fixtures.memory_cases import offloaded_ref_program
from fixtures.ranks import run_ranks
from fixtures.tiny import write_tiny_model
from verl.config.actor import PolicyLossConfig
from verl.config.rollout_correction import Band, Correction
from verl.protocol import DataProto
from verl.trainer.ppo.batching import split_even, split_mini_batches
from verl.trainer.rollouts.batch_padding import pad_and_concat
from verl.trainer.rollouts.forward_passes import join_parts
from verl.workers.actor import ActorWorker, log_prob_limits
from verl.workers.engine import MicroBatching


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return str(write_tiny_model(tmp_path_factory.mktemp("model")))


def run(ranks, config, data, mini_batch=6):
    """Return the joined columns before an update, its metrics by rank, and the joined columns after it."""
    shards, inverse = split_even(data, ranks)
    outcomes = run_ranks(ranks, worker_program, config, shards, split_mini_batches(data, mini_batch, ranks))
    before, metrics, after = zip(*outcomes, strict=True)
    return DataProto.concat(before)[inverse], metrics, DataProto.concat(after)[inverse]


def test_columns_and_metrics_of_an_update_with_a_frozen_reference(model_dir):
    data = make_batch(12)
    reference = None
    for ranks in (1, 2):
        before, metrics, after = run(ranks, worker_config(model_dir), data)
        mask = data.batch["response_mask"] == 0
        for column in ("old_log_probs", "entropys", "ref_log_prob"):
            assert before.batch[column].shape == (12, 7)
            assert before.batch[column].dtype == torch.float32
            assert not before.batch[column][mask].any()
        torch.testing.assert_close(before.batch["ref_log_prob"], before.batch["old_log_probs"])
        torch.testing.assert_close(after.batch["ref_log_prob"], before.batch["ref_log_prob"])
        assert (after.batch["old_log_probs"] - before.batch["old_log_probs"]).abs().max() > 1e-3
        assert all(other == metrics[0] for other in metrics)
        assert set(metrics[0]) == {
            "actor/perf/padding_fraction",
            "actor/pg_loss",
            "actor/pg_clipfrac",
            "actor/pg_clipfrac_lower",
            "actor/ppo_kl",
            "actor/entropy",
            "actor/entropy_loss",
            "actor/kl_loss",
            "actor/kl_coef",
            "actor/grad_norm",
            "actor/lr",
            "actor/loss",
            "actor/perf/max_memory_allocated_gb",
            "actor/perf/cpu_memory_used_gb",
        }
        assert all(type(value) is float for value in metrics[0].values())
        reference = reference or metrics[0]
        for name, value in reference.items():
            if "memory" not in name:
                assert metrics[0][name] == pytest.approx(value, rel=1e-4, abs=1e-8), name
        parts = metrics[0]["actor/pg_loss"] - 0.01 * metrics[0]["actor/entropy"] + 0.1 * metrics[0]["actor/kl_loss"]
        assert metrics[0]["actor/loss"] == pytest.approx(parts, rel=1e-5)
        assert 0.05 < metrics[0]["actor/perf/max_memory_allocated_gb"] < 100


@pytest.mark.slow
def test_entropy_bonus_and_kl_loss_contribute_to_the_gradient(model_dir):
    data = make_batch(12)
    data.batch["advantages"].zero_()
    norms = {}
    for name, over in {
        "nothing": {"entropy_coeff": 0.0, "use_kl_loss": False},
        "entropy": {"entropy_coeff": 0.5, "use_kl_loss": False},
        "kl": {"entropy_coeff": 0.0, "use_kl_loss": True},
    }.items():
        _, metrics, _ = run(1, worker_config(model_dir, actor=actor_config(**over)), data)
        norms[name] = metrics[0]["actor/grad_norm"]
        assert metrics[0]["actor/entropy"] > 0
        assert ("actor/kl_loss" in metrics[0]) == (name == "kl")
    assert norms["nothing"] == 0 and norms["entropy"] > 0.01 and norms["kl"] > 0.01


@pytest.mark.slow
def test_the_entropy_bonus_raises_the_entropy(model_dir):
    data = make_batch(12)
    data.batch["advantages"].zero_()
    actor = actor_config(entropy_coeff=1.0, use_kl_loss=False, optim=optim_config(lr=3e-3))
    before, _, after = run(1, worker_config(model_dir, actor=actor), data)
    assert after.batch["entropys"].sum() > before.batch["entropys"].sum()


@pytest.mark.slow
def test_a_positive_advantage_raises_the_probability(model_dir):
    data = make_batch(12)
    data.batch["advantages"] = torch.ones_like(data.batch["advantages"])

    def program(rank):
        worker = make_worker(rank, worker_config(model_dir, actor=actor_config(use_kl_loss=False, entropy_coeff=0.0)))
        data.batch["old_log_probs"] = worker.compute_log_prob(data).batch["old_log_probs"]
        metrics = worker.update_actor(split_mini_batches(data, 12, 1)[0])
        return metrics, data.batch["old_log_probs"], worker.compute_log_prob(data).batch["old_log_probs"]

    [(metrics, before, after)] = run_ranks(1, program)
    assert after.sum() > before.sum()
    # On policy: ratio 1, no clipping, the loss is minus the mean advantage.
    assert metrics["actor/pg_loss"] == pytest.approx(-1.0, rel=1e-5)
    assert metrics["actor/ppo_kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["actor/pg_clipfrac"] == 0.0


@pytest.mark.slow
def test_epochs_repeat_the_mini_batches_and_the_schedule_counts_updates(model_dir):
    data = make_batch(12)
    optim = optim_config(lr=1e-3, lr_warmup_steps=4)

    def program(rank):
        lr, weights = [], []
        for epochs, repeats in ((2, 1), (1, 2)):
            worker = make_worker(rank, worker_config(model_dir, actor=actor_config(ppo_epochs=epochs, optim=optim)))
            shards = split_mini_batches(data, 6, 1)[0] * repeats
            lr.append([worker.update_actor(shards)["actor/lr"] for _ in range(3)])
            weights.append(dict(worker.export_weights()))
        return lr, weights

    [(lr, (twice, doubled))] = run_ranks(1, program)
    assert lr[0] == lr[1] == pytest.approx([0.0, 2.5e-4, 5e-4])
    assert all(torch.equal(twice[name], doubled[name]) for name in twice)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loaded_checkpoint_continues_training_and_has_a_hugging_face_directory(tmp_path, model_dir, ranks):
    actor = actor_config(optim=optim_config(lr_warmup_steps=4))
    actor.checkpoint.save_contents = ["model", "optimizer", "extra", "hf_model"]
    updates = split_mini_batches(make_batch(12), 6, ranks)
    path = str(tmp_path / "actor")
    config = worker_config(model_dir, actor=actor)
    for first, second, lr in run_ranks(ranks, worker_checkpoint_program, config, updates, path):
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert lr == pytest.approx([2.5e-4, 2.5e-4])
    AutoModelForCausalLM.from_pretrained(tmp_path / "actor" / "huggingface")


def test_log_prob_limits_fall_back_to_those_of_the_actor(model_dir):
    config = worker_config(model_dir, rollout={"log_prob_micro_batch_size_per_gpu": 3})
    config.ref.log_prob_use_dynamic_bsz = True
    assert log_prob_limits(config.rollout, config.actor) == MicroBatching(size=3)
    assert log_prob_limits(config.ref, config.actor) == MicroBatching(max_tokens=64)


@pytest.mark.parametrize("ranks", [1, 2])
def test_columns_of_pieces_equal_those_of_the_full_batch(model_dir, ranks):
    data = make_batch(11)
    pieces = [[5, 3, 10, 0], [7, 6, 2, 9], [1, 4], [8]]  # with the last piece, the second rank has no sample
    narrow = [pad_and_concat([data[rows]], 0) for rows in pieces]
    assert len({piece.batch["responses"].shape[1] for piece in narrow}) > 1
    parts = [np.array_split(np.arange(len(rows)), ranks) for rows in pieces]
    split = [split_even(piece, ranks, parts=part) for piece, part in zip(narrow, parts, strict=True)]
    config = worker_config(model_dir, rollout={"log_prob_micro_batch_size_per_gpu": 2})
    full, inverse = split_even(data, ranks)
    outcomes = run_ranks(ranks, pieces_program, config, [full, *(shards for shards, _ in split)])
    expected, *columns = (DataProto.concat(list(of_ranks)) for of_ranks in zip(*outcomes, strict=True))
    expected = expected[inverse]
    in_order = [column[order] for column, (_, order) in zip(columns, split, strict=True)]
    found = join_parts(list(zip(pieces, in_order, strict=True)), data.batch["responses"].shape[1])
    assert sorted(found.batch.keys()) == ["entropys", "old_log_probs", "ref_log_prob"]
    for name, column in found.batch.items():
        torch.testing.assert_close(column, expected.batch[name], msg=name)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_offloaded_reference_is_on_the_device_only_in_its_passes(model_dir, ranks):
    data = make_batch(12)
    shards, _ = split_even(data, ranks)
    updates = split_mini_batches(data, 6, ranks)
    config = worker_config(model_dir, rollout={"log_prob_micro_batch_size_per_gpu": 6})
    config.ref.log_prob_micro_batch_size_per_gpu = 12
    kept = run_ranks(ranks, offloaded_ref_program, config, shards, updates)
    config.ref.fsdp_config.param_offload = True
    offloaded = run_ranks(ranks, offloaded_ref_program, config, shards, updates)
    for (before, after, found), (expected, later, full) in zip(offloaded, kept, strict=True):
        torch.testing.assert_close(before.batch["ref_log_prob"], expected.batch["ref_log_prob"])
        torch.testing.assert_close(after.batch["ref_log_prob"], later.batch["ref_log_prob"])
        size = full[0]
        assert size > 1000 and full == [size] * 6
        assert found == [0, size, 0, 0, size, 0]


def test_ref_log_prob_without_a_reference_policy_is_an_error(model_dir):
    def program(rank):
        return make_worker(rank, worker_config(model_dir)).compute_ref_log_prob(make_batch(2))

    with pytest.raises(RuntimeError, match="with_ref=True"):
        run_ranks(1, program)


def test_an_unknown_policy_loss_fails_before_the_model_is_read():
    actor = actor_config()
    actor.policy_loss.loss_mode = "vanila"
    worker = ActorWorker(
        0,
        1,
        "127.0.0.1",
        0,
        worker_config("nowhere", actor=actor),
        total_training_steps=1,
        max_model_len=64,
        with_ref=False,
        device="cpu",
    )
    with pytest.raises(RuntimeError, match=r"init_model\(\) first"):
        list(worker.export_weights())
    with pytest.raises(ValueError, match=r"loss_mode='vanila'.*vanilla"):
        worker.init_model()


def test_a_worker_joins_and_leaves_the_process_group(model_dir):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"total_training_steps": 1, "max_model_len": 64, "with_ref": False, "device": "cpu"}
    worker = ActorWorker(0, 1, "127.0.0.1", port, worker_config(model_dir), **options)
    worker.init_model()
    assert dist.is_initialized()
    worker.close()
    assert not dist.is_initialized()


# ---- bypass mode and losses that select tokens ----------------------------------------------------------------------


def run_bypass(ranks, config, correction, data, mini_batch=6):
    """Return the log-probabilities before an update, its metrics, its training log-probabilities, and the weights."""
    shards, inverse = split_even(data, ranks)
    updates = split_mini_batches(data, mini_batch, ranks)
    before, metrics, parts, weights = zip(
        *run_ranks(ranks, bypass_program, config, correction, shards, updates), strict=True
    )
    training_log_probs = torch.zeros(data.batch["response_mask"].shape)
    for index, log_probs in parts:
        if len(index):
            training_log_probs[index] = log_probs
    return DataProto.concat(list(before))[inverse], metrics[0], training_log_probs, weights[0]


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["ppo_clip", "reinforce"])
def test_bypass_mode_uses_its_loss_and_returns_training_log_probs(model_dir, loss_type):
    data = make_batch(12)
    config = worker_config(model_dir, actor=actor_config(use_kl_loss=False, ppo_epochs=2))
    correction = Correction(bypass_mode=True, loss_type=loss_type, rollout_is="token", rollout_is_band=Band(0.5, 2.0))
    _, plain, _, _ = run_bypass(1, config, None, data) if loss_type == "reinforce" else (None, None, None, None)
    reference = None
    for ranks in (1, 2):
        before, metrics, training_log_probs, weights = run_bypass(ranks, config, correction, data)
        # The first mini-batch is trained with the initial policy, the second with the changed policy.
        torch.testing.assert_close(training_log_probs[:6], before.batch["old_log_probs"][:6], atol=1e-5, rtol=1e-5)
        difference = (training_log_probs[6:] - before.batch["old_log_probs"][6:]).abs().max()
        assert 1e-4 < difference < 1.0
        reference = reference or (metrics, weights)
        assert metrics["actor/pg_loss"] == pytest.approx(reference[0]["actor/pg_loss"], rel=1e-4)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, reference[1][name], atol=2e-5, rtol=1e-4)
    if plain is not None:
        assert reference[0]["actor/pg_loss"] != pytest.approx(plain["actor/pg_loss"], rel=1e-3)


@pytest.mark.parametrize("loss_mode", ["clip_cov", pytest.param("kl_cov", marks=pytest.mark.slow)])
def test_tokens_are_selected_from_the_whole_mini_batch(model_dir, loss_mode):
    data = make_batch(12)
    data.meta_info["global_step"] = 7
    policy_loss = PolicyLossConfig(
        loss_mode=loss_mode, clip_cov_ratio=0.2, clip_cov_lb=0.1, clip_cov_ub=50.0, kl_cov_ratio=0.1
    )
    config = worker_config(model_dir, actor=actor_config(use_kl_loss=False, policy_loss=policy_loss))
    reference = None
    for ranks in (1, 2):
        outcomes = run_ranks(ranks, selecting_program, config, split_mini_batches(data, 6, ranks))
        chosen = torch.zeros(data.batch["response_mask"].shape, dtype=torch.int64)
        for parts, _, _ in outcomes:
            for index, selected in parts:
                chosen[index] = selected
        assert 0 < chosen.sum() < data.batch["response_mask"].sum()
        assert not chosen[data.batch["response_mask"] == 0].any()
        reference = reference or (chosen, *outcomes[0][1:])
        assert torch.equal(chosen, reference[0])
        assert outcomes[0][1]["actor/pg_loss"] == pytest.approx(reference[1]["actor/pg_loss"], rel=1e-4)
        for name, weight in outcomes[0][2].items():
            torch.testing.assert_close(weight, reference[2][name], atol=2e-5, rtol=1e-4)


# ---- sequence and tensor parallelism --------------------------------------------------------------------------------

SHARED = pytest.mark.parametrize("shared", ["sequences", "layers"])


def shared_config(model_dir, size, shared, **over):
    """Return a config in which `size` ranks share sequences or layers of the actor, and none of the reference model."""
    sizes = {"ulysses_sequence_parallel_size": size}
    if shared == "layers":
        sizes = {"fsdp_config": fsdp_config(tensor_parallel_size=size)}
    actor = actor_config(optim=optim_config(lr=2e-5), ppo_epochs=2, **sizes, **over)
    config = worker_config(model_dir, actor=actor)
    config.ref.ulysses_sequence_parallel_size = 1
    return config


@pytest.mark.slow
@SHARED
def test_ranks_that_share_samples_update_like_one(model_dir, shared):
    """Log-probabilities of policy and reference before and after an update, and its metrics."""
    data = make_batch(12)
    shards, updates = [data], split_mini_batches(data, 6, 1)
    [expected] = run_ranks(1, worker_program, shared_config(model_dir, 1, shared), shards, updates)
    for found in run_ranks(2, worker_program, shared_config(model_dir, 2, shared), shards * 2, updates * 2):
        for ours, theirs in ((found[0], expected[0]), (found[2], expected[2])):
            assert ours.batch.keys() == theirs.batch.keys()
            for name, column in theirs.batch.items():
                torch.testing.assert_close(ours.batch[name], column, rtol=1e-6, atol=1e-5, msg=name)
        for name in (name for name in expected[1] if not name.startswith("actor/perf/")):
            assert found[1][name] == pytest.approx(expected[1][name], rel=1e-4, abs=1e-6), name


@pytest.mark.slow
@SHARED
def test_ranks_that_share_samples_select_and_return_the_tokens_of_one(model_dir, shared):
    """Losses that select tokens of a mini-batch, and the log-probabilities of bypass mode, on two groups of two."""
    data = make_batch(12)
    data.meta_info["global_step"] = 7
    loss = PolicyLossConfig(loss_mode="clip_cov", clip_cov_ratio=0.2, clip_cov_lb=0.1, clip_cov_ub=50.0)

    def run(ranks, size):
        shards = split_mini_batches(data, 6, ranks // size)
        config = shared_config(model_dir, size, shared, use_kl_loss=False, policy_loss=loss)
        selected = run_ranks(ranks, selecting_program, config, [shard for shard in shards for _ in range(size)])
        shards, _ = split_even(data, ranks // size)
        updates = split_mini_batches(data, 6, ranks // size)
        shards, updates = ([part for part in parts for _ in range(size)] for parts in (shards, updates))
        config = shared_config(model_dir, size, shared, use_kl_loss=False)
        bypass = run_ranks(ranks, bypass_program, config, Correction(bypass_mode=True), shards, updates)
        return selected[::size], [trained for _, _, trained, _ in bypass[::size]]

    def in_order(parts):
        columns = torch.zeros(data.batch["response_mask"].shape)
        for index, column in parts:
            columns[index] = column.float()
        return columns

    selected, trained = run(1, 1)
    found, found_trained = run(4, 2)
    chosen = in_order(part for parts, _, _ in selected for part in parts)
    assert chosen.any()
    assert torch.equal(in_order(part for parts, _, _ in found for part in parts), chosen)
    assert found[0][1]["actor/pg_loss"] == pytest.approx(selected[0][1]["actor/pg_loss"], rel=1e-4)
    torch.testing.assert_close(in_order(found_trained), in_order(trained), rtol=1e-6, atol=1e-5)
