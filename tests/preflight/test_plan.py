import pickle

import pytest

from verl.config import RolloutConfig
from verl.config.rollout import CheckpointEngineConfig
from verl.config.weight_updates import full_update_reason
from verl.utils.dtypes import choose_dtype

MIB = 1 << 20


def test_numbers_of_one_step(plan_of):
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


def test_what_is_left_out_of_an_epoch_and_where_several_nodes_are(plan_of, monkeypatch):
    plan = plan_of(data__train_batch_size=16)
    assert "training steps" in plan.render() and "2 an epoch, which leaves 8 prompts out" in plan.render()
    assert "left out" not in plan_of().render() and "nodes" not in plan_of().render()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    two = plan_of(trainer__nnodes=2)
    assert "2 of the trainer, replicas on the same; weights by gloo" in two.render()
    assert (two.trainer_ranks, two.replicas, two.memory.ranks, two.memory.replicas) == (2, 2, 1, 1)
    one = plan_of().memory
    assert two.memory.total_bytes == pytest.approx(one.total_bytes, rel=0.05)
    apart = plan_of(
        actor_rollout_ref__rollout__nnodes=2,
        actor_rollout_ref__rollout__n_gpus_per_node=3,
        actor_rollout_ref__rollout__checkpoint_engine__backend="gloo",
    )
    assert "1 of the trainer, 2 of the replicas; weights by gloo" in apart.render()
    assert (apart.replicas, apart.memory.replicas) == (6, 0) and "replica:" not in apart.render()


def test_dtypes_and_the_weight_update(plan_of, run_files):
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


def test_memory_against_the_sum_by_hand(plan_of, run_files):
    run_files.write_safetensors(run_files.weights, {"a": (25600, 1024)})
    parameters = 25600 * 1024
    delta = "actor_rollout_ref__rollout__checkpoint_engine__delta"
    fixed = {
        "actor_rollout_ref__rollout__dtype": "float32",
        "actor_rollout_ref__actor__fsdp_config__dtype": "float32",
        delta: "'off'",
    }
    one, two = plan_of(**fixed).memory, plan_of(**fixed, trainer__n_gpus_per_node=2).memory
    with_ref = plan_of(**fixed, actor_rollout_ref__actor__use_kl_loss=True).memory
    # float32 master weights, gradients, two moments: 16 bytes a parameter, halved on two ranks; the reference 4 more
    assert abs(one.trainer_bytes - two.trainer_bytes - 8 * parameters) < MIB
    assert with_ref.trainer_bytes - one.trainer_bytes == 4 * parameters
    # what was sent last, in float32 too: the trainer's ranks share it
    changes = plan_of(**(fixed | {delta: "auto"}), trainer__n_gpus_per_node=2).memory
    assert changes.trainer_bytes - two.trainer_bytes == 2 * parameters
    assert changes.replica_bytes == two.replica_bytes
    half = plan_of(**(fixed | {"actor_rollout_ref__rollout__dtype": "bfloat16"})).memory
    # 8192 requests of 32 tokens take a block of 128 tokens each: keys and values of 2 layers with 2 heads of 8
    many = plan_of(**fixed, actor_rollout_ref__rollout__max_num_seqs=8192).memory
    assert many.cache_bytes == 8193 * 128 * 2 * 2 * 2 * 8 * 4
    assert one.cache_bytes == 64 * MIB
    # float32 instead of bfloat16, packed, and in both layouts while it is loaded
    assert one.replica_bytes - half.replica_bytes == 3 * 2 * parameters + one.cache_bytes - half.cache_bytes
    assert one.total_bytes == one.trainer_bytes + one.replica_bytes + one.other_bytes
    assert two.total_bytes == 2 * two.trainer_bytes + 2 * two.replica_bytes + two.other_bytes


def test_the_table(plan_of, run_files):
    plan = plan_of(trainer__save_freq=5, trainer__max_actor_ckpt_to_keep=2, actor_rollout_ref__rollout__n=1)
    lines = plan.render().splitlines()
    assert lines[0] == "plan" and all(line.isascii() for line in lines)
    rows = [line for line in lines[1:] if not line.startswith(("  note:", "  warning:"))]
    columns = {line.index(line[2:].lstrip().split("  ")[-1].strip()) for line in rows if "  " in line.strip()}
    assert len(columns) == 1
    text = plan.render()
    for part in ("8 (5 an epoch)",):
        assert part not in text
    for part in (
        "4, 4 on each rank",
        "16 prompt + 16 response",
        "40 to train on, 4 to validate on",
        "150 (5 an epoch)",
        "1 trainer rank(s), 1 replica(s) x 1 tensor parallel",
        f"{run_files.out}, every 5 steps and after the last, the last 2 kept",
        f"file ({run_files.out}/metrics.jsonl)",
        "warning: actor_rollout_ref.rollout.n=1",
        "note: no effect on a CPU",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({}, "bucket(s), then what changed"),
        ({"checkpoint_engine__delta": "'off'"}, "always (checkpoint_engine.delta=off)"),
    ],
)
def test_the_table_tells_whether_updates_after_the_first_are_whole(plan_of, run_files, over, words):
    run_files.write_safetensors(run_files.weights, {"a": (256, 1024)})
    assert words in plan_of(**{f"actor_rollout_ref__rollout__{key}": value for key, value in over.items()}).render()


def test_why_updates_are_whole():
    def why(device, delta="auto", **rollout):
        return full_update_reason(
            RolloutConfig(checkpoint_engine=CheckpointEngineConfig(delta=delta), **rollout), device
        )

    assert why("cpu") is why("npu") is why("cpu", quantization="ascend") is None
    assert why("cuda", free_cache_engine=False) is why("cpu", quantization_side="receiver") is None
    assert "frees its weights" in why("cuda")
    assert "quantization_side=receiver" in why("cpu", quantization="ascend", quantization_side="receiver")
    assert "delta=off" in why("npu", delta="off")


def test_filtered_prompts_are_at_most_so_many(plan_of):
    assert "at most 40 to train on" in plan_of(data__filter_overlong_prompts=True).render()


def test_secrets_are_not_in_the_table(plan_of):
    text = plan_of(
        actor_rollout_ref__rollout__server__enable_http=True, actor_rollout_ref__rollout__server__api_key="s3cret"
    ).render()
    assert "s3cret" not in text


def test_a_plan_survives_pickling(plan_of):
    plan = plan_of()
    assert pickle.loads(pickle.dumps(plan)) == plan


@pytest.mark.parametrize("dynamic", [True, False])
def test_micro_batches(plan_of, dynamic):
    plan = plan_of(actor_rollout_ref__actor__use_dynamic_bsz=dynamic)
    assert (plan.micro_batch_tokens is not None) == dynamic == (plan.micro_batches_per_rank is None)
    assert ("filled up to 16,384 tokens" in plan.render()) == dynamic
