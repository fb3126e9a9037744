"""Log-probabilities and steps of the engine, compared with transformers and torch, for any split of the batch."""

import math

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from fixtures.engine_cases import (
    actor_config,
    export_program,
    follow_program,
    fsdp_config,
    log_prob_program,
    make_batch,
    make_engine,
    optim_config,
    squares_program,
    step_program,
    train,
    uneven_loss_program,
)
from fixtures.mask_cases import masked_gradient_program, with_sampling_masks
from fixtures.ranks import run_ranks
from fixtures.tiny import write_tiny_model
from verl.protocol import DataProto
from verl.trainer.ppo.batching import POLICY_COLUMNS, split_even, split_mini_batches
from verl.trainer.ppo.core_algos import LOSS_AGG_MODES, get_policy_loss_fn
from verl.workers.engine import MicroBatching
from verl.workers.policy_objective import PolicyObjective

KINDS = ["qwen3", "llama", "qwen3_moe"]
ALL = MicroBatching(size=100)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {kind: str(write_tiny_model(root / kind, kind=kind)) for kind in KINDS}


def plain_log_probs(model, data):
    """Return log-probabilities and entropies [B, T], computed with left padding, attention mask and all logits."""
    ids, width = data.batch["input_ids"], data.batch["responses"].shape[1]
    logits = model(
        input_ids=ids, attention_mask=data.batch["attention_mask"], position_ids=data.batch["position_ids"]
    ).logits
    log_p = (logits[:, -width - 1 : -1].float() / data.meta_info["temperature"]).log_softmax(-1)
    mask = data.batch["response_mask"]
    chosen = log_p.gather(-1, data.batch["responses"].unsqueeze(-1)).squeeze(-1) * mask
    return chosen, -(log_p.exp() * log_p).sum(-1) * mask


@pytest.mark.parametrize(
    ("ranks", "limits", "options"),
    [
        pytest.param(1, ALL, {}, id="packed"),
        pytest.param(1, MicroBatching(size=5), {"use_remove_padding": False}, id="padded", marks=pytest.mark.slow),
        pytest.param(
            2,
            MicroBatching(max_tokens=33),
            {"enable_gradient_checkpointing": True},
            id="2 ranks",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_sampling_masks_restrict_log_probs_and_gradients(models, ranks, limits, options):
    """The reference is a float64 model with padding, whose removed tokens have the logit -inf."""
    data = with_sampling_masks(make_batch(), vocab_size=128)
    model = AutoModelForCausalLM.from_pretrained(models["qwen3"], dtype=torch.float64)
    ids, width = data.batch["input_ids"], data.batch["responses"].shape[1]
    attention, positions = data.batch["attention_mask"], data.batch["position_ids"]
    logits = model(input_ids=ids, attention_mask=attention, position_ids=positions).logits[:, -width - 1 : -1]
    removed = torch.zeros(logits.shape, dtype=torch.bool)
    for row, masks in enumerate(data.non_tensor_batch["sampling_masks"]):
        for token in range(len(masks)):
            if masks.counts[token]:
                removed[row, token] = True
                removed[row, token, masks[token : token + 1].ids] = False
    log_p = (logits / data.meta_info["temperature"]).masked_fill(removed, -math.inf).log_softmax(-1)
    expected = log_p.gather(-1, data.batch["responses"].unsqueeze(-1))[..., 0] * data.batch["response_mask"]
    (expected * data.batch["advantages"]).sum().backward()

    shards, inverse = split_even(data, ranks, columns=(*POLICY_COLUMNS, "advantages"))
    results = run_ranks(ranks, masked_gradient_program, models["qwen3"], shards, limits, options)
    log_probs = torch.cat([log_probs for log_probs, _ in results])[inverse]
    torch.testing.assert_close(log_probs.double(), expected.detach(), rtol=0, atol=1e-5)
    for name, parameter in model.named_parameters():
        for _, gradient in results:
            torch.testing.assert_close(gradient[name].double(), parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("limits", "options"),
    [
        (ALL, {}),
        (MicroBatching(size=5), {"use_remove_padding": False}),
        (MicroBatching(max_tokens=33), {"enable_gradient_checkpointing": True}),
    ],
)
def test_log_probs_equal_those_of_transformers(models, kind, limits, options):
    data = make_batch()
    model = AutoModelForCausalLM.from_pretrained(models[kind])
    with torch.no_grad():
        expected, expected_entropy = plain_log_probs(model, data)
    [(log_probs, entropy)] = run_ranks(1, log_prob_program, models[kind], [data], limits, options)
    assert log_probs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=1e-5)
    assert not log_probs[data.batch["response_mask"] == 0].any()
    assert not entropy[data.batch["response_mask"] == 0].any()


@pytest.mark.parametrize(
    ("architecture", "over"),
    [
        ("Gemma2", {"sliding_window": 4, "final_logit_softcapping": 2.0}),  # processes logits after the head
        ("Granite", {"logits_scaling": 4.0}),
        ("Mistral", {"sliding_window": 4}),  # window shorter than the sequences
        ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),  # eager attention, sinks
        ("Glm4Moe", {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}),  # saved buffers
    ],
)
def test_other_architectures(tmp_path, architecture, over):
    """Log-probabilities equal those of transformers, and exported weights equal the saved weights."""
    common = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.1}
    config = getattr(transformers, f"{architecture}Config")(**common, **heads, pad_token_id=0, **over)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    data = make_batch()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        expected, _ = plain_log_probs(model, data)
    for ranks in (1, 2):
        shards = [data] * ranks
        for log_probs, _ in run_ranks(ranks, log_prob_program, str(tmp_path), shards, MicroBatching(size=5), {}):
            torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-5)
        saved = load_file(tmp_path / "model.safetensors")
        for weights in run_ranks(ranks, export_program, str(tmp_path), None):
            assert set(weights) == set(saved)
            assert all(torch.equal(weights[name], tensor) for name, tensor in saved.items())


@pytest.mark.parametrize("ranks", [1, 2])
def test_sums_of_squared_probabilities_equal_those_of_transformers(models, ranks):
    data = make_batch()
    model = AutoModelForCausalLM.from_pretrained(models["qwen3"])
    with torch.no_grad():
        logits = model(
            input_ids=data.batch["input_ids"],
            attention_mask=data.batch["attention_mask"],
            position_ids=data.batch["position_ids"],
        ).logits
    probs = (logits[:, -8:-1].double() / 0.8).softmax(-1)
    expected = (probs.square().sum(-1) * data.batch["response_mask"]).float()
    for log_probs, entropy, squares in run_ranks(ranks, squares_program, models["qwen3"], data):
        assert entropy is None and log_probs.any()
        assert squares.dtype == torch.float32
        torch.testing.assert_close(squares, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("size", [12, 13, 1])
def test_log_probs_on_two_ranks_equal_those_on_one(models, kind, size):
    """With size 1, one of the ranks has no sample."""
    data = make_batch(13)[:size]
    limits = MicroBatching(max_tokens=40)
    [(expected, expected_entropy)] = run_ranks(1, log_prob_program, models[kind], [data], limits, {})
    shards, inverse = split_even(data, 2, balance=True)
    parts = run_ranks(2, log_prob_program, models[kind], shards, limits, {})
    results = [DataProto.from_dict(tensors={"log_probs": a, "entropy": b}) for a, b in parts]
    joined = DataProto.concat(results)[inverse]
    torch.testing.assert_close(joined.batch["log_probs"], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(joined.batch["entropy"], expected_entropy, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_equal_those_of_an_unsharded_model(models, kind):
    """Loss, gradient norm and weights of AdamW steps with clipping."""
    data, actor = make_batch(12), actor_config(loss_agg_mode="seq-mean-token-mean")
    model = AutoModelForCausalLM.from_pretrained(models[kind])
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01, foreach=False)
    expected = []
    for mini_batch in (data[:5], data[5:10], data[10:]):
        tokens = mini_batch.batch["response_mask"].sum(1)
        info = {
            "batch_num_tokens": int(tokens.sum()),
            "global_batch_size": int((tokens > 0).sum()),
            "loss_scale_factor": 7,
        }
        log_probs, entropy = plain_log_probs(model, mini_batch)
        objective = PolicyObjective(get_policy_loss_fn("vanilla"), actor, info)
        loss, _ = objective(log_probs, entropy, dict(mini_batch.batch.items()))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append((loss.item(), norm.item()))

    def program(rank):
        engine = make_engine(models[kind], actor=actor)
        history = train(engine, split_mini_batches(data, 5, 1)[0], MicroBatching(size=2), actor)
        return history, {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}

    [(history, weights)] = run_ranks(1, program)
    for (loss, norm), metrics in zip(expected, history, strict=True):
        assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    for name, tensor in model.state_dict().items():
        # Adam divides by the gradient's magnitude: for a gradient near 0, rounding decides the step's direction.
        difference = (weights[name].full_tensor() - tensor).abs()
        assert difference.mean() < 1e-6, name
    assert history[0]["loss"] == pytest.approx(expected[0][0], rel=1e-5)
    assert history[0]["grad_norm"] == pytest.approx(expected[0][1], rel=1e-5)


def invariance_cases(data, ranks):
    """Return cases with every aggregation and several splits; at learning rate 0, all start from the same weights."""
    splits = [MicroBatching(size=2), MicroBatching(max_tokens=40)] + (
        [ALL, MicroBatching(size=1)] if ranks == 1 else []
    )
    cases = []
    for mode in LOSS_AGG_MODES:
        actor = actor_config(loss_agg_mode=mode, optim=optim_config(lr=0.0))
        for limits in splits:
            shards = split_mini_batches(data, 13, ranks, balance=limits.size is None)
            cases.append((actor, limits, shards))
    return cases


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_a_step_does_not_depend_on_the_split(models, kind):
    data = make_batch(13)
    reference = {}
    for ranks in (1, 2):
        cases = invariance_cases(data, ranks)
        results, *others = run_ranks(ranks, step_program, models[kind], cases, {})
        assert all(other == results for other in others), "ranks disagree"
        for (actor, limits, _), [metrics] in zip(cases, results, strict=True):
            expected = reference.setdefault(actor.loss_agg_mode, metrics)
            assert metrics["grad_norm"] > 0
            for name, value in expected.items():
                if name == "padding_fraction":  # a micro-batch without samples has two tokens of padding
                    continue
                context = f"{name} with {actor.loss_agg_mode}, {ranks} ranks, {limits}"
                assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-9), context


def test_aggregations_give_different_losses(models):
    """The test above would also pass if the mode were ignored."""
    cases = [case for case in invariance_cases(make_batch(13), 1) if case[1] == ALL]
    losses = [history[0]["actor/pg_loss"] for history in run_ranks(1, step_program, models["qwen3"], cases, {})[0]]
    assert len({round(loss, 6) for loss in losses}) == len(LOSS_AGG_MODES)


@pytest.mark.parametrize(
    "options", [{"enable_gradient_checkpointing": True}, {"use_remove_padding": False}, {"reshard": False}]
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_memory_options_do_not_change_the_step(models, options, ranks):
    data, options = make_batch(12), dict(options)
    plain = actor_config(optim=optim_config(lr=0.0))
    other = actor_config(
        optim=optim_config(lr=0.0), fsdp_config=fsdp_config(reshard_after_forward=options.pop("reshard", True))
    )
    limits, shards = MicroBatching(size=4), split_mini_batches(data, 12, ranks)
    expected = run_ranks(ranks, step_program, models["qwen3"], [(plain, limits, shards)], {})[0]
    found = run_ranks(ranks, step_program, models["qwen3"], [(other, limits, shards)], options)[0]
    for name, value in expected[0][0].items():
        if name != "padding_fraction":
            assert found[0][0][name] == pytest.approx(value, rel=1e-5, abs=1e-9), name


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_without_samples_and_mini_batches_without_tokens(models, ranks):
    """A mini-batch without any response token has loss 0 and gradient 0."""
    data = make_batch(4)
    data.batch["response_mask"][3] = 0
    actor = actor_config(optim=optim_config(lr=0.0))
    cases = [(actor, MicroBatching(size=1), split_mini_batches(data[rows], 4, ranks)) for rows in ([0], [1], [1, 3])]
    one, empty, two_empty = run_ranks(ranks, step_program, models["qwen3_moe"], cases, {})[0]
    assert one[0]["grad_norm"] > 0
    assert empty[0]["grad_norm"] == two_empty[0]["grad_norm"] == 0
    assert empty[0]["loss"] == two_empty[0]["loss"] == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_that_is_a_constant_on_one_rank_with_another_metric(models, ranks):
    """With two ranks, one has a micro-batch without response tokens."""
    shards = [mini_batches[0] for mini_batches in split_mini_batches(make_batch(4)[[0, 2, 3]], 3, ranks)]
    first, *others = run_ranks(ranks, uneven_loss_program, models["qwen3"], shards)
    assert all(other == first for other in others)
    assert first["number"] == pytest.approx(2.0) and "nothing" not in first
    for rank in range(ranks):
        assert first[f"rank_{rank}"] == pytest.approx(rank + 5.0)
    [expected] = run_ranks(
        1, uneven_loss_program, models["qwen3"], [split_mini_batches(make_batch(4)[[0, 2, 3]], 3, 1)[0][0]]
    )
    assert first["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert first["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


def test_bfloat16_compute_is_close_to_float32_and_masters_stay_float32(models):
    data = make_batch(12)
    actor = actor_config(fsdp_config=fsdp_config(dtype="bfloat16"), optim=optim_config(lr=0.0))
    exact = actor_config(optim=optim_config(lr=0.0))
    limits, shards = MicroBatching(size=4), split_mini_batches(data, 12, 2)
    expected = run_ranks(2, step_program, models["qwen3"], [(exact, limits, shards)], {})[0][0][0]
    found = run_ranks(2, step_program, models["qwen3"], [(actor, limits, shards)], {})[0][0][0]
    assert found["loss"] != expected["loss"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.05)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.1)
    for weights in run_ranks(2, export_program, models["qwen3"], None, actor):
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_bfloat16_masters_train_and_stay_bfloat16(models):
    actor = actor_config(fsdp_config=fsdp_config(model_dtype="bf16", dtype="bfloat16"), optim=optim_config(lr=1e-2))
    shards = split_mini_batches(make_batch(12), 6, 2)
    history = run_ranks(2, step_program, models["qwen3"], [(actor, MicroBatching(size=4), shards)], {})[0][0]
    assert all(math.isfinite(metrics["grad_norm"]) for metrics in history)
    for weights in run_ranks(2, export_program, models["qwen3"], None, actor):
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize("ranks", [1, 2])
def test_log_probs_use_the_current_weights(models, tmp_path, ranks):
    """FSDP keeps no stale gathered parameters after forward passes without backward, steps and loads."""
    data, actor = make_batch(12), actor_config(optim=optim_config(lr=1e-2))
    shards = split_mini_batches(data, 12, ranks)
    programs = run_ranks(ranks, follow_program, models["qwen3"], data, shards, actor, str(tmp_path / "checkpoint"))
    for before, trained, loaded, weights in programs:
        plain = AutoModelForCausalLM.from_pretrained(models["qwen3"])
        missing, unexpected = plain.load_state_dict(weights, strict=False)
        assert missing == ["lm_head.weight"] and not unexpected
        plain.eval()
        with torch.no_grad():
            expected, _ = plain_log_probs(plain, data)
        torch.testing.assert_close(trained, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(loaded, expected, rtol=0, atol=1e-5)
        assert (trained - before).abs().max() > 1e-2


def test_no_parameter_stays_gathered_after_log_probs(models):
    def program(rank):
        engine = make_engine(models["qwen3"])
        engine.log_probs(make_batch(4), ALL, calculate_entropy=False)
        return [name for name, parameter in engine.model.named_parameters() if not isinstance(parameter, DTensor)]

    assert run_ranks(1, program) == [[]]


def test_the_learning_rate_follows_the_schedule(models):
    optim = optim_config(lr=2e-3, lr_warmup_steps=2, lr_scheduler_type="cosine", min_lr_ratio=0.5)
    actor = actor_config(optim=optim)
    shards = split_mini_batches(make_batch(12), 2, 1)
    history = run_ranks(1, step_program, models["qwen3"], [(actor, ALL, shards)], {"steps": 6})[0][0]
    expected = [0.0, 0.5, 1.0] + [0.5 + 0.25 * (1 + math.cos(math.pi * k / 4)) for k in (1, 2, 3)]
    assert [metrics["lr"] for metrics in history] == pytest.approx([2e-3 * factor for factor in expected])


def test_temperature_must_be_positive(models):
    data = make_batch(4, temperature=0.0)
    with pytest.raises(ValueError, match=r"temperature=0\.0"):
        run_ranks(1, log_prob_program, models["qwen3"], [data], ALL, {})
