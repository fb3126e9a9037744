"""Sizes of sequence parallelism that do not fit ranks, model or each other."""

import json

import pytest

from fixtures.run_files import MODEL_CONFIG

A, R, C = "actor_rollout_ref__actor__", "actor_rollout_ref__ref__", "critic__"
SIZE = "ulysses_sequence_parallel_size"
FOUR = {"trainer__n_gpus_per_node": 4, "trainer__device": "cpu"}


def role(section, run_files):
    """Return the overrides with which a run has the role of a section."""
    if section.startswith(C):
        return {"algorithm__adv_estimator": "gae", "critic__model__path": run_files.model}
    return {f"{A}use_kl_loss": True} if section.startswith(R) else {}


@pytest.mark.parametrize("section", [A, f"{A}fsdp_config__", R, f"{R}fsdp_config__", C, f"{C}fsdp__"])
def test_a_size_must_divide_the_ranks_and_the_query_heads(problems_of, run_files, section):
    given = {**FOUR, **role(section, run_files), f"{section}{SIZE}": 3}
    name = f"{section.replace('__', '.')}{SIZE}"
    by_ranks, by_heads = problems_of(**given)
    assert by_ranks.startswith(f"{name}=3: must divide the 4 ranks of the trainer")
    assert by_ranks.endswith("use one of 1, 2, 4")
    assert by_heads.startswith(f"{name}=3: must divide the 4 query heads of {run_files.model}")
    assert by_heads.endswith("use one of 1, 2, 4")


@pytest.mark.parametrize("section", [A, R, C])
def test_valid_sizes(plan_of, run_files, section):
    plan = plan_of(**FOUR, **role(section, run_files), **{f"{section}{SIZE}": 2})
    expected = {A: 2, R: 1, C: 1}[section]
    assert plan.sequence_parallel == expected
    assert plan.data_parallel == 4 // expected
    assert plan.samples_per_rank == 16 // (4 // expected)


def test_ranks_that_share_sequences_count_as_one_for_the_sizes_of_batches(plan_of, problem_of):
    """Two samples per mini-batch do not divide among four ranks, but among two groups of two."""
    sizes = {"actor_rollout_ref__rollout__n": 2, f"{A}ppo_mini_batch_size": 1, f"{A}ppo_micro_batch_size_per_gpu": 1}
    assert "do not divide evenly among 4 ranks" in problem_of(**FOUR, **sizes)
    plan = plan_of(**FOUR, **sizes, **{f"{A}{SIZE}": 2})
    assert plan.samples_per_rank == plan.micro_batches_per_rank == 1
    assert "2 samples, 1 on each group of 2 ranks" in plan.render()
    sizes |= {f"{A}ppo_mini_batch_size": 8, f"{A}ppo_micro_batch_size_per_gpu": 3}
    problem = problem_of(**FOUR, **sizes, **{f"{A}{SIZE}": 2})
    assert "must divide the 8 samples of a mini-batch on each group of 2 ranks" in problem


def test_token_limits_are_those_of_one_rank(plan_of, problem_of):
    """A sample has up to 32 tokens."""
    limit = {f"{A}use_dynamic_bsz": True, f"{A}ppo_max_token_len_per_gpu": 16}
    plan = plan_of(**FOUR, **limit, **{f"{A}{SIZE}": 2})
    assert plan.micro_batch_tokens == 32
    assert "filled up to 32 tokens, on each group of 2 ranks" in plan.render()
    problem = problem_of(**FOUR, **limit | {f"{A}ppo_max_token_len_per_gpu": 15}, **{f"{A}{SIZE}": 2})
    assert "which 2 ranks share); use at least 16" in problem
    other = {f"{A}use_kl_loss": True, f"{R}{SIZE}": 1}
    problem = problem_of(**FOUR, **limit, **other, **{f"{A}{SIZE}": 2})
    assert "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=16: a sample can have 32 tokens" in problem


def test_a_section_and_its_fsdp_config_must_not_differ(problem_of):
    problem = problem_of(**FOUR, **{f"{A}{SIZE}": 2, f"{A}fsdp_config__{SIZE}": 4})
    assert f"actor_rollout_ref.actor.{SIZE}=2: differs from actor_rollout_ref.actor.fsdp_config.{SIZE}=4" in problem


def test_padded_rows_cannot_be_shared(problem_of, run_files):
    off = {"actor_rollout_ref__model__use_remove_padding": False}
    assert "model.use_remove_padding=False: with" in problem_of(**FOUR, **off, **{f"{A}{SIZE}": 2})
    off = {"critic__model__use_remove_padding": False, **role(C, run_files)}
    assert "critic.model.use_remove_padding=False: with" in problem_of(**FOUR, **off, **{f"{C}{SIZE}": 2})


@pytest.mark.parametrize(
    ("over", "reason"),
    [
        ({"model_type": "qwen3_next"}, "qwen3_next has layers other than softmax attention, which need whole"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types: linear_attention"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types: chunked_attention"),
        ({"model_type": "gemma2"}, "soft caps"),
    ],
)
def test_models_that_need_whole_sequences_are_refused(problem_of, plan_of, run_files, over, reason):
    (run_files.model / "config.json").write_text(json.dumps(MODEL_CONFIG | over))
    plan_of(**FOUR)
    problem = problem_of(**FOUR, **{f"{A}{SIZE}": 2})
    assert f"actor_rollout_ref.actor.{SIZE}=2: not supported for {run_files.model}" in problem
    assert reason in problem


def test_another_attention_implementation_is_refused(problem_of, plan_of):
    key = "actor_rollout_ref__model__override_config"
    plan_of(**FOUR, **{key: "{attn_implementation: sdpa}", f"{A}{SIZE}": 2})
    for name in ("eager", "flash_attention_2"):
        problem = problem_of(**FOUR, **{key: f"{{attn_implementation: {name}}}", f"{A}{SIZE}": 2})
        assert f"attn_implementation={name} computes whole rows" in problem


def test_sizes_of_roles_that_the_run_does_not_have_are_no_error(plan_of):
    plan_of(**FOUR, **{f"{R}{SIZE}": 3, f"{C}{SIZE}": 3})


def test_groups_across_nodes_get_a_warning(examine_on):
    keys = {"trainer.n_gpus_per_node": 4, "trainer.nnodes": 2, f"actor_rollout_ref.actor.{SIZE}": 8}
    _, found = examine_on(keys=keys, nodes=2)
    assert any("ranks of different nodes share sequences" in warning for warning in found.warnings)
