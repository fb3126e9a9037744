import pytest

from verl.utils.dtypes import choose_dtype


def test_numbers_of_one_training_step(plan_of):
    plan = plan_of(trainer__n_gpus_per_node=2, actor_rollout_ref__actor__ppo_epochs=3, trainer__total_epochs=7)
    # 8 prompts x 4 samples; mini-batches of 4 prompts; 2 ranks; micro-batches of 2; 40 rows of data
    assert (plan.prompts_per_step, plan.samples_per_step) == (8, 32)
    assert plan.optimizer_steps_per_step == 2 * 3
    assert (plan.samples_per_mini_batch, plan.samples_per_rank, plan.micro_batches_per_rank) == (16, 8, 4)
    assert (plan.train_prompts, plan.val_prompts, plan.steps_per_epoch, plan.total_steps) == (40, 4, 5, 35)
    assert (plan.trainer_ranks, plan.replicas, plan.tensor_parallel) == (2, 2, 1)
    # 32 x 16 + 16 x 48 + 16
    assert plan.parameters == 1296
    assert plan_of(trainer__total_training_steps=3).total_steps == 3
    assert plan_of(actor_rollout_ref__rollout__nnodes=1, actor_rollout_ref__rollout__n_gpus_per_node=3).replicas == 3


def test_processes_and_memory_on_several_nodes(plan_of, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    two = plan_of(trainer__nnodes=2)
    assert (two.trainer_ranks, two.replicas, two.memory.ranks, two.memory.replicas) == (2, 2, 1, 1)
    one = plan_of().memory
    assert two.memory.total_bytes == pytest.approx(one.total_bytes, rel=0.05)
    apart = plan_of(
        actor_rollout_ref__rollout__nnodes=2,
        actor_rollout_ref__rollout__n_gpus_per_node=3,
        actor_rollout_ref__rollout__checkpoint_engine__backend="gloo",
    )
    assert (apart.replicas, apart.memory.replicas) == (6, 0)


def test_dtypes_and_size_of_a_weight_update(plan_of, run_files):
    plan = plan_of(
        actor_rollout_ref__rollout__dtype="bf16",
        actor_rollout_ref__actor__fsdp_config__dtype="fp32",
        actor_rollout_ref__actor__fsdp_config__model_dtype="bf16",
    )
    assert (plan.rollout_dtype, plan.compute_dtype, plan.master_dtype) == ("bfloat16", "float32", "bfloat16")
    assert plan.update_bytes == 1296 * 2 and plan.update_buckets == 1
    auto = plan_of()
    assert (auto.compute_dtype, auto.rollout_dtype) == (choose_dtype("cpu").name,) * 2 and "auto" in auto.rollout_why
    run_files.write_safetensors(run_files.weights, {"a": (300, 1024)})
    plan = plan_of(
        actor_rollout_ref__rollout__dtype="float32",
        actor_rollout_ref__rollout__checkpoint_engine__update_weights_bucket_megabytes=1,
    )
    # 300 x 1024 x 4 bytes = 1.17 MiB
    assert plan.update_buckets == 2
