import pickle

import pytest


def test_table(plan_of, run_files):
    plan = plan_of(trainer__save_freq=5, trainer__max_actor_ckpt_to_keep=2, actor_rollout_ref__rollout__n=1)
    lines = plan.render().splitlines()
    assert lines[0] == "plan" and all(line.isascii() for line in lines)
    rows = [line for line in lines[1:] if not line.startswith(("  note:", "  warning:"))]
    columns = {line.index(line[2:].lstrip().split("  ")[-1].strip()) for line in rows if "  " in line.strip()}
    assert len(columns) == 1
    text = plan.render()
    for part in ("8 (5 per epoch)",):
        assert part not in text
    for part in (
        "4 samples, 4 on each rank",
        "16 prompt + 16 response",
        "40 for training, 4 for validation",
        "150 (5 per epoch)",
        "1 trainer rank(s), 1 replica(s) x 1 tensor parallel",
        f"{run_files.out}, every 5 steps and after the last step, the last 2 kept",
        f"file ({run_files.out}/metrics.jsonl)",
        "warning: actor_rollout_ref.rollout.n=1",
        "note: no effect on a CPU",
    ):
        assert part in text, part


def test_table_shows_prompts_that_an_epoch_leaves_out(plan_of):
    plan = plan_of(data__train_batch_size=16)
    assert "training steps" in plan.render() and "2 per epoch, 8 prompts left out" in plan.render()
    assert "left out" not in plan_of().render()


def test_table_shows_the_placement_of_several_machines(plan_of, monkeypatch):
    assert "nodes" not in plan_of().render()
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    two = plan_of(trainer__nnodes=2)
    assert "2 for the trainer, replicas on the same nodes; weights by gloo" in two.render()
    apart = plan_of(
        actor_rollout_ref__rollout__nnodes=2,
        actor_rollout_ref__rollout__n_gpus_per_node=3,
        actor_rollout_ref__rollout__checkpoint_engine__backend="gloo",
    )
    assert "1 for the trainer, 2 for the replicas; weights by gloo" in apart.render()
    assert "replica:" not in apart.render()


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({}, "bucket(s); later updates are deltas"),
        ({"checkpoint_engine__delta": "'off'"}, "every update is full (checkpoint_engine.delta=off)"),
    ],
)
def test_table_shows_if_later_updates_are_deltas(plan_of, run_files, over, words):
    run_files.write_safetensors(run_files.weights, {"a": (256, 1024)})
    assert words in plan_of(**{f"actor_rollout_ref__rollout__{key}": value for key, value in over.items()}).render()


def test_table_shows_an_upper_bound_of_filtered_prompts(plan_of):
    assert "at most 40 for training" in plan_of(data__filter_overlong_prompts=True).render()


@pytest.mark.parametrize("dynamic", [True, False])
def test_table_shows_micro_batches(plan_of, dynamic):
    plan = plan_of(actor_rollout_ref__actor__use_dynamic_bsz=dynamic)
    assert (plan.micro_batch_tokens is not None) == dynamic == (plan.micro_batches_per_rank is None)
    assert ("filled up to 16,384 tokens" in plan.render()) == dynamic


def test_table_shows_no_secrets(plan_of):
    text = plan_of(
        actor_rollout_ref__rollout__server__enable_http=True, actor_rollout_ref__rollout__server__api_key="s3cret"
    ).render()
    assert "s3cret" not in text


def test_a_plan_survives_pickling(plan_of):
    plan = plan_of()
    assert pickle.loads(pickle.dumps(plan)) == plan
