"""Ranks that share sequences: losses, gradients and weights equal those of a rank that has whole sequences."""

import dataclasses

import pytest
import torch

from fixtures.architectures import write_architecture
from fixtures.critic_cases import critic_batch, critic_config
from fixtures.engine_cases import actor_config, log_prob_program, make_batch, optim_config
from fixtures.mask_cases import with_sampling_masks
from fixtures.qat_cases import qat_gradient_program
from fixtures.ranks import run_ranks
from fixtures.sequence_cases import value_program
from fixtures.shared_work_cases import Case, check_resume, close, trained
from fixtures.tiny import write_tiny_model
from verl.config.actor import PolicyLossConfig
from verl.trainer.ppo.batching import CRITIC_COLUMNS, split_mini_batches
from verl.workers.engine import MicroBatching

# Micro-batches of odd numbers of tokens, and empty ones.
ODD = MicroBatching(max_tokens=33)
ALL = MicroBatching(size=100)
MODELS = {
    "qwen3": {},
    "qwen3_moe": {"kind": "qwen3_moe"},
    "one kv head": {"num_key_value_heads": 1},
    "3 kv heads": {"num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 16},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: str(write_tiny_model(root / str(i), **over)) for i, (name, over) in enumerate(MODELS.items())}


def case_of(size, limits=ODD, *, loss="vanilla", data=None, **options):
    actor = actor_config(
        policy_loss=PolicyLossConfig(loss_mode=loss),
        loss_agg_mode="seq-mean-token-mean" if loss == "gspo" else "token-mean",
        # AdamW's step is lr * g / |g|, in which tiny gradients have large rounding errors.
        optim=optim_config(lr=2e-5),
    )
    return Case(make_batch(12) if data is None else data, size, limits, actor, options)


def check_equal(path, world, case):
    """Compare every rank with a single rank that has its sequences for itself."""
    [expected], expected_columns = trained(path, 1, dataclasses.replace(case, size=1))
    results, columns = trained(path, world, case)
    assert len(expected.history) == 3
    close(columns, expected_columns, "column", rtol=1e-6)
    for rank, result in enumerate(results):
        close(result.columns, results[rank - rank % case.size].columns, "column of a neighbor", rtol=0, atol=0)
        close(result.gradients, expected.gradients, "gradient")
        close(result.weights, expected.weights, "weight", rtol=0)
        for step, metrics in zip(result.history, expected.history, strict=True):
            assert step.keys() == metrics.keys()
            for name in metrics.keys() - {"padding_fraction"}:
                assert step[name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("name", ["qwen3", *(pytest.param(name, marks=pytest.mark.slow) for name in [*MODELS][1:])])
def test_two_ranks_equal_one(models, name):
    check_equal(models[name], 2, case_of(2))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_four_ranks_equal_one(models, name, size):
    """In one group, and in two groups with different samples. With four, there are fewer key-value heads than ranks."""
    check_equal(models[name], 4, case_of(size))


VARIANTS = {
    "sequence-level importance ratios": {"loss": "gspo"},
    "one micro-batch": {"limits": ALL},
    "fewer tokens than ranks": {
        "limits": MicroBatching(size=1),
        "data": make_batch(12, prompt_width=1, response_width=2),
    },
    "recomputed activations": {"enable_gradient_checkpointing": True},
    "adapters": {"lora_rank": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "sampling masks": {"data": with_sampling_masks(make_batch(12), vocab_size=128)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_on_two_ranks_equal_one(models, name):
    check_equal(models["qwen3"], 2, case_of(2, **VARIANTS[name]))


@pytest.mark.slow
def test_two_groups_with_two_copies_of_the_weights_equal_one_rank(models):
    case = case_of(2)
    case.actor.fsdp_config.fsdp_size = 2
    check_equal(models["qwen3"], 4, case)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "over"),
    [
        ("Mistral", {"num_key_value_heads": 1}),  # windows that reach into another rank's part, on copies of a head
        ("Gemma3Text", {}),  # two kinds of rotary embeddings
        ("Cohere2", {}),  # layers without rotary embeddings
        ("Phi3", {}),  # rotary embeddings whose frequencies depend on the length
    ],
)
def test_other_architectures_on_two_ranks_equal_one(tmp_path, architecture, over):
    check_equal(write_architecture(tmp_path, architecture, **over), 2, case_of(2))


@pytest.mark.slow
def test_quantized_weights_on_two_ranks_equal_one(models):
    data, options = make_batch(12), {"activations": False}
    [expected] = run_ranks(1, qat_gradient_program, models["qwen3_moe"], [data], options, {})
    found = run_ranks(2, qat_gradient_program, models["qwen3_moe"], [data] * 2, options, {"sequence_parallel": 2})
    for gradients in found:
        close(gradients, expected, "gradient", atol=1e-5)


def test_values_on_two_ranks_equal_those_on_one(models):
    """Values, gradients, metrics and weights of the critic, with token limits of one rank."""
    data = critic_batch(12)
    limits = {"use_dynamic_bsz": True, "ppo_max_token_len_per_gpu": 33, "forward_max_token_len_per_gpu": 33}

    def run(size):
        config = critic_config(models["qwen3"], ulysses_sequence_parallel_size=size, **limits)
        config.optim.lr = 2e-5
        [shard] = split_mini_batches(data, 5, 1, columns=CRITIC_COLUMNS)
        return run_ranks(size, value_program, config, [data] * size, [shard] * size)

    [(values, gradients, metrics, weights)] = run(1)
    for ours in run(2):
        torch.testing.assert_close(ours[0], values, rtol=0, atol=1e-6)
        close(ours[1], gradients, "gradient")
        close(ours[3], weights, "weight", rtol=0)
        for name in (name for name in metrics if "/perf/" not in name):
            assert ours[2][name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [((2, 2), (1, 1)), ((1, 1), (2, 2)), ((2, 1), (2, 2))])
def test_a_checkpoint_resumes_with_another_size(tmp_path, models, before, after):
    """The pairs are ranks, and ranks that share sequences."""
    pairs = [(ranks, case_of(size)) for ranks, size in (before, after)]
    check_resume(models["qwen3"], case_of(1), *pairs, tmp_path / "checkpoint")


def test_a_model_that_cannot_pack_sequences_is_refused(tmp_path):
    path = write_architecture(tmp_path, "Gemma2")  # eager attention, with soft caps
    with pytest.raises(ValueError, match=r"ulysses_sequence_parallel_size above 1 is not supported for Gemma2Config"):
        run_ranks(2, log_prob_program, path, [make_batch(2)] * 2, ALL, {"sequence_parallel": 2})
