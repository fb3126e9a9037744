"""Sizes of the trainer's tensor parallelism that do not fit ranks, model or other keys."""

import json

import pytest

from fixtures.run_files import MODEL_CONFIG

A, R, C = "actor_rollout_ref__actor__fsdp_config__", "actor_rollout_ref__ref__fsdp_config__", "critic__fsdp__"
SIZE = "tensor_parallel_size"
FOUR = {"trainer__n_gpus_per_node": 4, "trainer__device": "cpu"}
TWO = {**FOUR, f"{A}{SIZE}": 2}
WITH_REF = {"actor_rollout_ref__actor__use_kl_loss": True}


@pytest.mark.parametrize(("section", "role"), [(A, {}), (R, WITH_REF)])
def test_a_size_must_divide_the_ranks_and_what_it_divides(problems_of, run_files, section, role):
    name = f"{section.replace('__', '.')}{SIZE}=3: must divide the"
    found = problems_of(**FOUR, **role, **{f"{section}{SIZE}": 3})
    expected = ["4 ranks of the trainer", "4 query heads", "2 key-value heads", "32 inner features"]
    assert len(found) == len(expected)
    for problem, words in zip(found, expected, strict=True):
        assert problem.startswith(f"{name} {words}") and "use one of 1, 2" in problem


def test_the_experts_must_divide(problem_of, run_files):
    moe = {"model_type": "qwen3_moe", "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 31}
    (run_files.model / "config.json").write_text(json.dumps(MODEL_CONFIG | moe | {"intermediate_size": 33}))
    assert f"{SIZE}=2: must divide the 3 experts of each layer of" in problem_of(**TWO)


def test_ranks_that_share_layers_count_as_one_for_the_sizes_of_batches(plan_of, problem_of):
    sizes = {
        "actor_rollout_ref__rollout__n": 2,
        "actor_rollout_ref__actor__ppo_mini_batch_size": 1,
        "actor_rollout_ref__actor__ppo_micro_batch_size_per_gpu": 1,
    }
    assert "do not divide evenly among 4 ranks" in problem_of(**FOUR, **sizes)
    plan = plan_of(**TWO, **sizes)
    assert plan.data_parallel == 2 and plan.samples_per_rank == plan.micro_batches_per_rank == 1
    assert "2 samples, 1 on each group of 2 ranks, which share each layer" in plan.render()


def test_token_limits_are_those_of_each_rank(plan_of, problem_of):
    """A sample has up to 32 tokens, and every rank processes all of them."""
    limit = {"actor_rollout_ref__actor__use_dynamic_bsz": True}
    tokens = "actor_rollout_ref__actor__ppo_max_token_len_per_gpu"
    assert plan_of(**TWO, **limit, **{tokens: 32}).micro_batch_tokens == 32
    assert "use at least 32" in problem_of(**TWO, **limit, **{tokens: 31})


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"actor_rollout_ref__actor__ulysses_sequence_parallel_size": 2}, "ulysses_sequence_parallel_size=2; set one"),
        ({f"{A}fsdp_size": 2}, "fsdp_config.fsdp_size=2; use fsdp_size=-1, which shards each part of a layer over 2"),
        ({"actor_rollout_ref__model__lora_rank": 8}, "not supported with LoRA"),
    ],
)
def test_keys_that_it_does_not_go_with(problems_of, keys, words):
    found = problems_of(**TWO, **keys)
    assert any(f"fsdp_config.{SIZE}=2: not supported with" in each and words in each for each in found)


def test_a_critic_is_refused(problems_of, run_files):
    critic = {"algorithm__adv_estimator": "gae", "critic__model__path": run_files.model, f"{C}{SIZE}": 2}
    assert any(f"critic.fsdp.{SIZE}=2: not supported for the critic" in each for each in problems_of(**FOUR, **critic))


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"model_type": "gpt_oss"}, "(model_type gpt_oss): tested with gemma3_text, llama, mistral"),
        ({"attention_bias": True}, "has attention_bias, and a bias of a layer whose inputs are divided"),
    ],
)
def test_models_whose_layers_ranks_cannot_share(problems_of, run_files, over, words):
    (run_files.model / "config.json").write_text(json.dumps(MODEL_CONFIG | over))
    assert any(f"fsdp_config.{SIZE}=2: " in each and words in each for each in problems_of(**TWO))


def test_blocks_of_quantization_aware_training_must_stay_whole(examine_on):
    keys = {"actor_rollout_ref.rollout.quantization": "ascend", f"{A}{SIZE}".replace("__", "."): 4}
    plan, found = examine_on("Qwen3-8B", keys)
    assert found.errors == [] and plan.qat and plan.data_parallel == plan.trainer_ranks // 4
    _, found = examine_on("Qwen3-8B", keys | {"actor_rollout_ref.model.override_config": "{intermediate_size: 1184}"})
    assert any("must divide intermediate_size=1184" in each and "multiples of 32" in each for each in found.errors)


def test_groups_across_nodes_get_a_warning(examine_on):
    keys = {"trainer.n_gpus_per_node": 4, "trainer.nnodes": 2, f"{A}{SIZE}".replace("__", "."): 8}
    _, found = examine_on(keys=keys, nodes=2)
    assert any("ranks of different nodes share layers" in warning for warning in found.warnings)


def test_less_memory_is_gathered_and_kept_for_the_backward_pass(examine_on):
    def update(size):
        plan, found = examine_on("Qwen3-8B", {f"{A}{SIZE}".replace("__", "."): size})
        assert found.errors == []
        return next(stage for stage in plan.device_memory.stages if stage.name == "actor update").parts

    one, four = update(1), update(4)
    assert four["gathered weights"] < one["gathered weights"]
    assert four["gradients"] == one["gradients"]
