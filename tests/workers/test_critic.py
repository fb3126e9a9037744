"""The critic worker on one and two ranks: columns, metrics, steps, checkpoints, for any split of the batch."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from fixtures.critic_cases import (
    critic_batch,
    critic_checkpoint_program,
    critic_config,
    make_critic,
    set_head,
    split_program,
    update_program,
)
from fixtures.engine_cases import fsdp_config
from fixtures.memory_cases import offloaded_critic_program
from fixtures.ranks import run_ranks
from fixtures.tiny import write_tiny_model
from verl.config.actor import CheckpointConfig
from verl.config.critic import CriticOptimConfig
from verl.protocol import DataProto
from verl.trainer.ppo.batching import CRITIC_COLUMNS, split_even, split_mini_batches
from verl.trainer.ppo.core_algos import LOSS_AGG_MODES
from verl.workers.critic import CriticWorker
from verl.workers.engine import MicroBatching, NonFiniteError


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return str(write_tiny_model(tmp_path_factory.mktemp("model")))


def mini_batches(data, size, ranks, **options):
    return split_mini_batches(data, size, ranks, columns=CRITIC_COLUMNS, **options)


def plain_steps(model_dir, data, size, clip, optimizer_steps):
    """Take AdamW steps with clipping on an unsharded model, with a loop over tokens for the loss.

    Returns:
        the metrics of each step, and the weights.
    """
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    head = torch.nn.Linear(64, 1)
    with torch.no_grad():
        head.weight.copy_(torch.linspace(-1.0, 1.0, 65)[:-1].view(1, 64) / 4)
        head.bias.fill_(-0.25)
    backbone = dict(model.model.named_parameters())
    parameters = [*backbone.values(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01, foreach=False)
    history = []
    for start in list(range(0, len(data), size))[:optimizer_steps]:
        part = data[start : start + size]
        states = model.model(
            input_ids=part.batch["input_ids"],
            attention_mask=part.batch["attention_mask"],
            position_ids=part.batch["position_ids"],
        ).last_hidden_state
        predicted = head(states).squeeze(-1)[:, -8:-1]
        terms, values, clipped = [], [], 0
        for b, t in part.batch["response_mask"].nonzero().tolist():
            v, old, target = predicted[b, t], part.batch["values"][b, t], part.batch["returns"][b, t]
            near = torch.minimum(torch.maximum(v, old - clip), old + clip)
            terms.append(torch.maximum((v - target) ** 2, (near - target) ** 2) / 2)
            values.append(v.item())
            clipped += ((near - target) ** 2 > (v - target) ** 2).item()
        loss = sum(terms) / len(terms)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append(
            {
                "critic/vf_loss": loss.item(),
                "critic/vf_clipfrac": clipped / len(terms),
                "critic/vpred_mean": sum(values) / len(values),
                "critic/grad_norm": norm.item(),
                "critic/lr": 1e-3,
            }
        )
    weights = {f"model.{name}": parameter.detach() for name, parameter in backbone.items()}
    weights |= {f"score.{name}": parameter.detach() for name, parameter in head.named_parameters()}
    return history, weights


@pytest.mark.parametrize("ranks", [1, 2])
def test_two_steps_equal_those_of_an_unsharded_model(model_dir, ranks):
    """Metrics are averaged over the optimizer steps."""
    data = critic_batch(12)
    steps, expected = plain_steps(model_dir, data, 6, 0.5, 2)
    outcomes = run_ranks(ranks, update_program, [(critic_config(model_dir), mini_batches(data, 6, ranks))])
    for [(history, weights)] in outcomes:
        [metrics] = history
        assert all(type(value) is float for value in metrics.values())
        assert metrics.pop("critic/perf/padding_fraction") == 0
        memory = {name: metrics.pop(name) for name in list(metrics) if name.endswith("_gb")}
        assert set(memory) == {"critic/perf/max_memory_allocated_gb", "critic/perf/cpu_memory_used_gb"}
        assert all(0.05 < value < 4096 for value in memory.values())
        assert set(metrics) == set(steps[0])
        for name in metrics:
            mean = (steps[0][name] + steps[1][name]) / 2
            assert metrics[name] == pytest.approx(mean, rel=1e-4, abs=1e-7), name
        assert 0 < metrics["critic/vf_clipfrac"] < 1
        assert set(weights) == set(expected)
        for name, tensor in expected.items():
            # Adam divides by the gradient's magnitude: for a gradient near 0, rounding decides the step's direction.
            assert (weights[name] - tensor).abs().mean() < 2e-6, name
            if name != "score.bias":
                assert torch.equal(weights[name].isfinite(), tensor.isfinite())


def split_cases(model_dir, data, ranks):
    """Return cases of one optimizer step with every aggregation and several splits."""
    splits = [MicroBatching(size=100), MicroBatching(size=3)] if ranks == 1 else [MicroBatching(max_tokens=40)]
    return [
        (
            critic_config(model_dir, loss_agg_mode=mode),
            limits,
            mini_batches(data, 13, ranks, balance=limits.size is None),
        )
        for mode in LOSS_AGG_MODES
        for limits in splits
    ]


@pytest.mark.slow
def test_a_step_does_not_depend_on_the_split(model_dir):
    data, reference = critic_batch(13), {}
    for ranks in (1, 2):
        cases = split_cases(model_dir, data, ranks)
        results, *others = run_ranks(ranks, split_program, cases)
        assert all(other == results for other in others), "ranks disagree"
        for (config, limits, _), metrics in zip(cases, results, strict=True):
            expected = reference.setdefault(config.loss_agg_mode, metrics)
            assert metrics["grad_norm"] > 0
            for name, value in expected.items():
                context = f"{name} with {config.loss_agg_mode}, {ranks} ranks, {limits}"
                assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-8), context
    assert len({round(metrics["loss"], 6) for metrics in reference.values()}) == len(LOSS_AGG_MODES)


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_gives_the_same_weights_on_one_rank_and_two(tmp_path, tied):
    path = str(write_tiny_model(tmp_path / "model", tied=tied))
    data, found = critic_batch(12), []
    for ranks in (1, 2):
        [first, *_] = run_ranks(ranks, update_program, [(critic_config(path), mini_batches(data, 12, ranks))])
        found.append(first[0][1])
    assert set(found[0]) == set(found[1])
    before = AutoModelForCausalLM.from_pretrained(path).state_dict()
    for name, tensor in found[0].items():
        assert (found[1][name] - tensor).abs().mean() < 2e-6, name
        assert name not in before or not torch.equal(before[name], tensor), f"{name} did not learn"


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_offloaded_state_changes_nothing(model_dir, ranks):
    updates = mini_batches(critic_batch(12), 6, ranks)
    model = {"enable_gradient_checkpointing": True}
    plain = critic_config(model_dir, model)
    keys = fsdp_config(param_offload=True, optimizer_offload=True)
    offloads = critic_config(model_dir, model | {"enable_activation_offload": True}, fsdp=keys)
    expected = run_ranks(ranks, offloaded_critic_program, plain, updates)
    found = run_ranks(ranks, offloaded_critic_program, offloads, updates)
    for (history, values, weights, held), (other, others, trained, kept) in zip(found, expected, strict=True):
        assert held == [0, 0] and min(kept) > 1000
        for metrics, wanted in zip(history, other, strict=True):
            assert computed(metrics) == pytest.approx(computed(wanted), rel=1e-6)
        torch.testing.assert_close(values, others, rtol=0, atol=1e-6)
        assert values.any() and all((weights[name] - tensor).abs().mean() < 1e-6 for name, tensor in trained.items())


def test_a_zero_head_learns(model_dir):
    """Values move from 0 to the returns."""
    data = critic_batch(12)
    data.batch["returns"] = 0.4 * (data.batch["responses"] % 3 - 1) * data.batch["response_mask"].float()

    def program(rank):
        worker = make_critic(critic_config(model_dir, optim=CriticOptimConfig(lr=5e-3)), rank)
        losses = []
        for _ in range(7):
            data.batch["values"] = worker.compute_values(data).batch["values"]
            losses.append(worker.update_critic(mini_batches(data, 12, 1)[0])["critic/vf_loss"])
        return losses

    [losses] = run_ranks(1, program)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_head_stays_float32_with_bfloat16_masters(model_dir, ranks):
    """The loss and the gradient norm are close to those with float32 masters."""
    data = critic_batch(12)
    config = critic_config(model_dir, fsdp=fsdp_config(model_dtype="bf16", dtype="bfloat16"))
    exact = run_ranks(1, update_program, [(critic_config(model_dir), mini_batches(data, 12, 1))])[0][0][0][0]
    for [(history, weights)] in run_ranks(ranks, update_program, [(config, mini_batches(data, 12, ranks))]):
        assert history[0]["critic/vf_loss"] == pytest.approx(exact["critic/vf_loss"], rel=0.05)
        assert history[0]["critic/grad_norm"] == pytest.approx(exact["critic/grad_norm"], rel=0.1)
        assert weights["score.weight"].dtype == torch.float32
        assert weights["model.norm.weight"].dtype == torch.bfloat16
        assert not torch.equal(weights["score.weight"], weights["score.weight"].bfloat16().float())


@pytest.mark.parametrize("ranks", [1, 2])
def test_values_are_in_the_order_of_the_batch(model_dir, ranks):
    data = critic_batch(13)

    def values_of(config):
        shards, inverse = split_even(data, ranks)
        parts = run_ranks(ranks, values_column_program, config, shards)
        return DataProto.concat(parts)[inverse].batch["values"]

    by_size = values_of(critic_config(model_dir))
    by_tokens = values_of(critic_config(model_dir, use_dynamic_bsz=True, forward_max_token_len_per_gpu=32))
    assert by_size.shape == (13, 7) and by_size.any()
    assert not by_size[data.batch["response_mask"] == 0].any()
    torch.testing.assert_close(by_size, by_tokens, rtol=1e-5, atol=1e-6)


def values_column_program(rank, config, shards):
    worker = make_critic(config, rank)
    set_head(worker.engine.model)
    result = worker.compute_values(shards[rank])
    assert list(result.batch.keys()) == ["values"]
    return result


def computed(metrics):
    """The metrics without those of memory, which no two processes share."""
    return {name: value for name, value in metrics.items() if not name.endswith("_gb")}


@pytest.mark.slow
def test_epochs_repeat_the_mini_batches_and_the_schedule_counts_updates(model_dir):
    data = critic_batch(12)
    optim = CriticOptimConfig(lr=1e-3, lr_warmup_steps=4)
    cases = [
        (critic_config(model_dir, ppo_epochs=epochs, optim=optim), [mini_batches(data, 6, 1)[0] * repeats])
        for epochs, repeats in ((2, 1), (1, 2))
    ]
    [((twice, weights), (doubled, others))] = run_ranks(1, update_program, cases, 3)
    assert [metrics["critic/lr"] for metrics in twice] == pytest.approx([0.0, 2.5e-4, 5e-4])
    assert [computed(metrics) for metrics in twice] == [computed(metrics) for metrics in doubled]
    assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (1, 2), (2, 1)])
def test_a_resumed_run_equals_an_uninterrupted_run(tmp_path, model_dir, before, after):
    """Weights, optimizer and schedule are restored, also with another number of ranks."""
    data = critic_batch(12)
    config = critic_config(model_dir, optim=CriticOptimConfig(lr=1e-3, lr_warmup_steps=4))
    path = str(tmp_path / "critic")

    def run(ranks, load, save):
        return run_ranks(ranks, critic_checkpoint_program, config, mini_batches(data, 4, ranks), load, save)[0]

    run(before, None, path)
    metrics, weights = run(after, path, None)
    [[(history, straight)]] = run_ranks(1, straight_program, config, mini_batches(data, 4, 1))
    assert metrics["critic/lr"] == history[1]["critic/lr"] == pytest.approx(2.5e-4)
    for name, value in computed(history[1]).items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    for name, tensor in straight.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=2e-5)


def straight_program(rank, config, updates):
    worker = make_critic(config, rank)
    history = [worker.update_critic(updates[rank]) for _ in range(2)]
    return [(history, dict(worker.engine.export_weights()))]


def test_a_checkpoint_has_only_the_configured_contents(tmp_path, model_dir):
    data = critic_batch(12)
    saved = CheckpointConfig(save_contents=["model", "hf_model"], load_contents=["model"])
    config = critic_config(model_dir, {"tokenizer_path": model_dir}, checkpoint=saved)
    path = tmp_path / "critic"
    [(_, weights)] = run_ranks(1, critic_checkpoint_program, config, mini_batches(data, 12, 1), None, str(path))
    assert sorted(entry.name for entry in path.iterdir()) == ["huggingface", "model"]
    model = AutoModelForTokenClassification.from_pretrained(path / "huggingface")
    assert torch.equal(model.score.weight, weights["score.weight"])
    run_ranks(1, critic_checkpoint_program, config, mini_batches(data, 12, 1), str(path), None)
    everything = critic_config(model_dir)
    with pytest.raises(FileNotFoundError, match="optimizer"):
        run_ranks(1, critic_checkpoint_program, everything, mini_batches(data, 12, 1), str(path), None)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_non_finite_return_stops_all_ranks(model_dir, ranks):
    data = critic_batch(12)
    data.batch["returns"][2, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="prompt-1"):
        run_ranks(ranks, update_program, [(critic_config(model_dir), mini_batches(data, 12, ranks))])


def test_limits_are_checked_before_the_model_is_read():
    config = critic_config("nowhere", ppo_micro_batch_size_per_gpu=None)
    worker = CriticWorker(0, 1, "127.0.0.1", 0, config, total_training_steps=1, max_model_len=64, device="cpu")
    with pytest.raises(RuntimeError, match=r"init_model\(\) first"):
        worker.compute_values(critic_batch(2))
    with pytest.raises(ValueError, match="micro_batch_size_per_gpu"):
        worker.init_model()
