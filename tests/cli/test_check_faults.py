"""`verl check` reports each fault that is planted in a valid script, and says what to do."""

import pytest

from fixtures.script import row

ROLLOUT, ACTOR = "actor_rollout_ref.rollout", "actor_rollout_ref.actor"


def planted(name, finds, fix, **changes):
    return pytest.param(changes, finds, fix, id=name)


FAULTS = [
    planted(
        "unknown key",
        ["actor_rollout_ref.rollout.temprature"],
        "actor_rollout_ref.rollout.temperature",
        keys={f"{ROLLOUT}.temprature": 1.0},
    ),
    planted(
        "mini-batch that does not divide",
        ["ppo_mini_batch_size=12", "data.train_batch_size=32"],
        "use 8 or 16",
        keys={f"{ACTOR}.ppo_mini_batch_size": 12},
    ),
    planted(
        "attention heads among devices",
        ["tensor_model_parallel_size=8", "6 attention heads"],
        "use one of 1, 2, 6",
        config={"num_attention_heads": 6},
        keys={f"{ROLLOUT}.tensor_model_parallel_size": 8, f"{ROLLOUT}.quantization": "null"},
    ),
    planted(
        "MXFP8 blocks cut by a rank",
        ["mlp.down_proj", "720 inputs", "360 per rank"],
        "use tensor_model_parallel_size=1, or leave it out",
        config={"intermediate_size": 720},
    ),
    planted(
        "prompts longer than the cap",
        ["data.max_prompt_length=64", "train.parquet, row 63", "with 83"],
        "raise it to 83 or more, or set data.filter_overlong_prompts=True",
        rows=[row()] * 63 + [row(words=80)],
    ),
    planted(
        "a row without a message",
        ["train.parquet, row 40", "'prompt' is an empty list"],
        "it must be a list of messages",
        rows=[row()] * 40 + [row(prompt=[])] + [row()] * 20,
    ),
    planted(
        "a data source without a scorer",
        ["train.parquet, row 7", "data_source=mine"],
        "set reward.custom_reward_function.path",
        rows=[row()] * 7 + [row(data_source="mine")] + [row()] * 30,
    ),
    planted(
        "a row without an answer",
        ["train.parquet, row 5", "reward_model.ground_truth"],
        "every row needs the correct answer",
        rows=[row()] * 5 + [row(reward_model={"style": "rule", "ground_truth": None})] + [row()] * 30,
    ),
    planted(
        "samples longer than the model's positions",
        ["data.max_response_length=2048", "1024 positions"],
        "lower their sum to at most 1024",
        keys={"data.max_response_length": 2048},
    ),
    planted(
        "a token budget that no sample fits",
        ["ppo_max_token_len_per_gpu=100", "128 tokens"],
        "use at least 128",
        keys={f"{ACTOR}.ppo_max_token_len_per_gpu": 100},
    ),
    planted(
        "an engine that leaves the trainer no memory",
        ["generation needs about", "128.0 GB"],
        "set actor_rollout_ref.rollout.gpu_memory_utilization=0.9",
        keys={f"{ROLLOUT}.gpu_memory_utilization": 0.99},
    ),
    planted(
        "an engine without room for its weights",
        ["gpu_memory_utilization=0.02", "cannot hold the engine's weights"],
        "raise one of the two",
        keys={f"{ROLLOUT}.gpu_memory_utilization": 0.02},
    ),
    planted(
        "quantization of another device",
        ["quantization=fp8", "not on an Ascend NPU"],
        "use ascend there",
        keys={f"{ROLLOUT}.quantization": "fp8"},
    ),
    planted(
        "an environment in which the engine cannot sleep",
        ["PYTORCH_NPU_ALLOC_CONF=expandable_segments:True"],
        "remove it",
        before="export PYTORCH_NPU_ALLOC_CONF=expandable_segments:True",
    ),
    planted(
        "a reward function of another name",
        ["reward.custom_reward_function.name=compute_scores"],
        "did you mean compute_score?",
        keys={"reward.custom_reward_function.name": "compute_scores"},
        reward=True,
    ),
    planted(
        "more nodes than there are",
        ["--nodes 2", "needs 4 nodes"],
        "use --nodes 4",
        keys={f"{ROLLOUT}.nnodes": 3, f"{ROLLOUT}.checkpoint_engine.backend": "hccl"},
    ),
    planted(
        "shared memory across nodes",
        ["checkpoint_engine.backend=naive"],
        "use hccl",
        keys={f"{ROLLOUT}.nnodes": 2},
        nodes=3,
    ),
]


@pytest.mark.parametrize(("changes", "finds", "fix"), FAULTS)
def test_each_fault_is_reported_with_its_fix(script, check, changes, finds, fix):
    script.config(**changes.get("config", {}))
    if "rows" in changes:
        script.rows(changes["rows"])
    if changes.get("reward"):
        script.keys["reward.custom_reward_function.path"] = script.reward
    script.keys |= changes.get("keys", {})
    hardware = ("--device", "npu:ascend950", "--nodes", changes.get("nodes", 2))
    status, answer = check(script.write(changes.get("before", "")), *hardware)
    errors = answer["runs"][0]["errors"]
    assert status == 1 and len(errors) == 1, errors
    assert fix in errors[0]
    assert all(text in errors[0] for text in finds), errors[0]


def test_the_script_without_faults_has_no_errors(script, check):
    status, answer = check(script.write(), "--device", "npu:ascend950")
    assert (status, answer["ok"], answer["runs"][0]["errors"]) == (0, True, [])
    assert answer["runs"][0]["plan"]["prompt_lengths"] == {"measured": 64, "median": 7, "longest": 7, "over": 0}


def test_several_faults_are_reported_together(script, check):
    script.keys |= {f"{ACTOR}.ppo_mini_batch_size": 12, f"{ROLLOUT}.gpu_memory_utilization": 0.99}
    script.rows([row(data_source="mine")] * 40)
    status, answer = check(script.write(), "--device", "npu:ascend950")
    text = "\n".join(answer["runs"][0]["errors"])
    assert status == 1 and len(answer["runs"][0]["errors"]) == 3
    assert all(words in text for words in ("ppo_mini_batch_size=12", "data_source=mine", "generation needs about"))
