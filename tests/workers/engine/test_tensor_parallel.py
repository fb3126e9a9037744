"""Ranks that share layers: log-probabilities, gradients, norms and weights equal those of a rank with whole layers."""

from functools import partial

import pytest
import torch

from fixtures.architectures import write_architecture
from fixtures.engine_cases import actor_config, fsdp_config, make_batch, optim_config
from fixtures.fake_quant import fake_quantized
from fixtures.mask_cases import with_sampling_masks
from fixtures.memory_cases import assert_same_training, train_program
from fixtures.qat_cases import qat_step_program
from fixtures.ranks import run_ranks
from fixtures.sent_cases import delta_program, differing
from fixtures.shared_work_cases import Case, check_resume, checkpoint_program, close, trained
from fixtures.tensor_cases import qat_program, sent_program
from fixtures.tiny import write_tiny_model
from verl.trainer.ppo.batching import split_mini_batches
from verl.workers.engine import MicroBatching

# Micro-batches of different numbers of samples, and empty ones.
LIMITS = MicroBatching(max_tokens=33)
MODELS = {"qwen3": {}, "qwen3_moe": {"kind": "qwen3_moe"}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: str(write_tiny_model(root / str(i), **over)) for i, (name, over) in enumerate(MODELS.items())}


def case_of(size, *, data=None, limits=LIMITS, mini_batch=5, **options):
    actor = actor_config(
        loss_agg_mode="token-mean",
        fsdp_config=fsdp_config(tensor_parallel_size=size),
        # AdamW's step is lr * g / |g|, in which tiny gradients have large rounding errors.
        optim=optim_config(lr=2e-5),
    )
    return Case(make_batch(12) if data is None else data, size, limits, actor, options, mini_batch)


def check_equal(path, world, size, **options):
    """Compare every rank with a single rank that has whole layers."""
    [expected], expected_columns = trained(path, 1, case_of(1, **options))
    results, columns = trained(path, world, case_of(size, **options))
    close(columns, expected_columns, "column", rtol=1e-5)
    assert len(expected.history) == 3
    assert expected.gradients.keys() == results[0].gradients.keys()
    for result in results:
        close(result.gradients, expected.gradients, "gradient")
        close(result.weights, expected.weights, "weight", rtol=0)
        for step, metrics in zip(result.history, expected.history, strict=True):
            assert step.keys() == metrics.keys()
            for name in metrics.keys() - {"padding_fraction"}:
                assert step[name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("name", ["qwen3", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_two_ranks_equal_one(models, name):
    check_equal(models[name], 2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_two_groups_of_two_ranks_equal_one(models, name):
    check_equal(models[name], 4, 2)


VARIANTS = {
    "recomputed activations": ("qwen3_moe", {"enable_gradient_checkpointing": True}),
    "logits in memory": ("qwen3", {"use_fused_kernels": False}),
    "padded rows": ("qwen3", {"use_remove_padding": False}),
    "sampling masks": ("qwen3", {"data": with_sampling_masks(make_batch(12), vocab_size=128)}),
    "fewer samples than groups": ("qwen3_moe", {"data": make_batch(12)[:3], "mini_batch": 1}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_on_two_groups_equal_one_rank(models, name):
    kind, options = VARIANTS[name]
    check_equal(models[kind], 4, 2, **options)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Qwen2", "Gemma3Text", "Mixtral"])
def test_other_architectures_on_two_ranks_equal_one(tmp_path, architecture):
    check_equal(write_architecture(tmp_path, architecture), 2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_the_sent_bytes_and_files_equal_those_of_one_rank(models, tmp_path, name, ranks):
    def sent(world, size):
        return run_ranks(world, sent_program, models[name], case_of(size).actor, str(tmp_path / str(size)))[0]

    expected, found = sent(1, 1), sent(ranks, 2)
    assert expected and differing(found, expected) == []
    files = [(tmp_path / str(size) / "model.safetensors").read_bytes() for size in (1, 2)]
    assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.parametrize("rollout", [{}, {"quantization": None}], ids=["mxfp8", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_deltas_give_the_weights_of_a_full_update(models, name, rollout):
    outcomes = run_ranks(4, partial(delta_program, actor=case_of(2).actor), models[name], rollout)[0]
    for outcome in outcomes[1:]:
        assert outcome["differs"] == []
    assert len(outcomes[-1]["changed"]) > 8


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [((4, 2), (1, 1)), ((1, 1), (4, 2)), ((2, 1), (2, 2)), ((2, 2), (2, 1))])
def test_a_checkpoint_resumes_with_another_size(tmp_path, models, before, after):
    """The pairs are ranks, and ranks that share layers."""
    pairs = [(ranks, case_of(size)) for ranks, size in (before, after)]
    check_resume(models["qwen3_moe"], case_of(1), *pairs, tmp_path / "checkpoint")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_quantized_weights_on_two_groups_equal_one_rank(models, name):
    data, options = make_batch(12), {"activations": False}
    [(log_probs, gradients)] = run_ranks(1, qat_program, models[name], [data], options, case_of(1).actor)
    shards = [data[:6], data[:6], data[6:], data[6:]]
    found = run_ranks(4, qat_program, models[name], shards, options, case_of(2).actor)
    torch.testing.assert_close(torch.cat([found[0][0], found[2][0]]), log_probs, rtol=1e-5, atol=1e-5)
    for _, ours in found:
        close(ours, gradients, "gradient", rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_offloaded_state_trains_as_state_on_the_device(models, tmp_path):
    shards = [shard for shard in split_mini_batches(make_batch(12), 4, 2) for _ in range(2)]
    offloaded = {"param_offload": True, "optimizer_offload": True}
    recomputed = {"enable_gradient_checkpointing": True}
    keys = {"tensor_parallel_size": 2}
    plain = run_ranks(4, train_program, models["qwen3"], shards, keys, recomputed)
    moved = run_ranks(
        4, train_program, models["qwen3"], shards, keys | offloaded, recomputed | {"enable_activation_offload": True}
    )
    for ours, theirs in zip(moved, plain, strict=True):
        assert_same_training(ours, theirs)


@pytest.mark.parametrize(
    ("architecture", "over", "words"),
    [
        ("Phi3", {}, "the plan divides this Linear as 'rowwise_split_input', which is not supported"),
        ("Llama", {"attention_bias": True}, "a bias of a layer whose inputs are divided is not supported"),
        (
            "Llama",
            {"intermediate_size": 63},
            "must divide the 63 outputs of LlamaForCausalLM",
        ),
        ("Llama", {"num_key_value_heads": 1}, "must divide num_key_value_heads=1"),
    ],
)
def test_layers_that_cannot_be_divided_are_refused(tmp_path, architecture, over, words):
    path = write_architecture(tmp_path, architecture, **over)
    with pytest.raises(ValueError, match=r"use fsdp_config\.tensor_parallel_size=1|must divide") as error:
        run_ranks(2, checkpoint_program, path, case_of(2), [[], []], None, None)
    assert words in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_quantized_inputs_too_train_on_the_bytes_that_are_sent(models, tmp_path, name):
    """Log-probabilities after the steps are those of the exported model, rounded by code that is independent."""
    data = make_batch()
    shards = [shard for shard in split_mini_batches(data, 4, 2) for _ in range(2)]
    model = {"actor": case_of(2).actor}
    outcomes = run_ranks(4, qat_step_program, models[name], shards, data, str(tmp_path), model)
    with torch.no_grad():
        expected = rounded_log_probs(fake_quantized(tmp_path), data)
    for outcome in outcomes:
        difference = (outcome["log_probs"] - expected)[expected != 0].abs()
        # A number on the other side of a rounding boundary changes the rest of its sequence a little.
        assert (difference < 1e-5).float().mean() > 0.75 and difference.max() < 0.1
        assert outcome["again"] and differing(outcome["sent"], outcome["again"]) == []
        assert outcome["changed"] and all(outcome["changed"].values())


def rounded_log_probs(model, data):
    width = data.batch["responses"].shape[1]
    columns = {name: data.batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    logits = model(**columns).logits[:, -width - 1 : -1]
    chosen = (logits / data.meta_info["temperature"]).log_softmax(-1).gather(-1, data.batch["responses"].unsqueeze(-1))
    return chosen.squeeze(-1) * data.batch["response_mask"]
