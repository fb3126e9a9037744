import json

import pytest


def test_a_missing_file_is_an_error(problem_of, run_files):
    text = problem_of(data__train_files=run_files.root / "nothing.parquet")
    assert text.startswith("data.train_files: ") and "nothing.parquet" in text and "does not exist" in text


def test_an_empty_file_is_an_error(problem_of, run_files):
    run_files.val.write_bytes(b"")
    text = problem_of()
    assert text.startswith("data.val_files: ") and "val.parquet" in text and "empty" in text


def test_a_file_without_rows_is_an_error(problem_of, run_files):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([], schema=pa.schema([("prompt", pa.string())])), run_files.val)
    assert "has no rows" in problem_of()


@pytest.mark.parametrize("keep", [4, 0.5, 0.99])
def test_a_truncated_parquet_file_is_an_error(problem_of, run_files, keep):
    whole = run_files.train.read_bytes()
    run_files.train.write_bytes(whole[: int(keep if keep >= 1 else len(whole) * keep)])
    text = problem_of()
    assert text.startswith("data.train_files: ") and "train.parquet" in text and "truncated" in text


def test_a_missing_prompt_column_is_an_error(problem_of, run_files):
    run_files.write_prompts(run_files.train, 40, prompt=None, question="ab")
    text = problem_of()
    assert "train.parquet" in text and "no column 'prompt'" in text and "question" in text and "data.prompt_key" in text


def test_rows_and_errors_of_json_lines(plan_of, problem_of, run_files):
    path = run_files.write_prompts(run_files.root / "train.jsonl", 24)
    assert plan_of(data__train_files=path).train_prompts == 24
    run_files.write_prompts(path, 24, prompt=None)
    assert "no column 'prompt'" in problem_of(data__train_files=path)
    path.write_text('{"prompt": [')
    assert "line 1" in problem_of(data__train_files=path)
    path.write_text(json.dumps([1, 2]))
    text = problem_of(data__train_files=path)
    assert "row 0" in text and "JSON int" in text


def test_rows_of_files_add_up_to_at_most_max_samples(plan_of, run_files):
    files = f"['{run_files.train}','{run_files.val}']"
    assert plan_of(data__train_files=files).train_prompts == 44
    assert plan_of(data__train_files=files, data__train_max_samples=17).train_prompts == 17


def test_an_unknown_suffix_is_an_error(problem_of, run_files):
    path = run_files.root / "train.csv"
    path.write_text("prompt\n")
    assert ".csv" in problem_of(data__train_files=path)


def test_fewer_prompts_than_a_batch_are_an_error(problem_of):
    text = problem_of(data__train_batch_size=64, actor_rollout_ref__actor__ppo_mini_batch_size=64)
    assert "data.train_batch_size=64" in text and "only 40 prompts" in text


def test_trust_remote_code_must_also_be_set_for_the_model(problem_of, plan_of):
    assert "actor_rollout_ref.model.trust_remote_code" in problem_of(data__trust_remote_code=True)
    plan_of(data__trust_remote_code=True, actor_rollout_ref__model__trust_remote_code=True)


def test_a_missing_dataset_class_is_an_error(problems_of, problem_of, plan_of, run_files):
    text = "\n".join(problems_of(data__custom_cls__path="/nowhere.py"))
    assert "data.custom_cls.name is not set" in text and "/nowhere.py: no such file" in text
    run_files.reward.write_text("class Mine: pass\ndef compute_score(**sample): return 0.0\n")
    problem = problem_of(data__custom_cls__path=run_files.reward, data__custom_cls__name="Main")
    assert problem.startswith("data.custom_cls.name=Main: ") and "has no class Main; it has Mine" in problem
    plan = plan_of(data__custom_cls__path=run_files.reward, data__custom_cls__name="Mine", data__train_files="anything")
    assert plan.train_prompts is None and "dataset class" in plan.render()


def test_a_directory_instead_of_a_dataset_class_is_an_error(problem_of, tmp_path):
    problem = problem_of(data__custom_cls__path=tmp_path, data__custom_cls__name="Mine")
    assert problem.startswith(f"data.custom_cls.path={tmp_path}: is a directory")


SAMPLER = "from verl.experimental.dataset.sampler import AbstractSampler\nclass Mine(AbstractSampler): pass\n"


@pytest.fixture
def sampler(tmp_path):
    """The overrides of a valid sampler."""
    path = tmp_path / "sampler.py"
    path.write_text(SAMPLER)
    return {"data__sampler__class_path": path, "data__sampler__class_name": "Mine"}


def test_a_sampler_decides_about_the_number_of_steps(plan_of, sampler):
    plan = plan_of(**sampler)
    assert plan.train_prompts == 40 and plan.steps_per_epoch is None and plan.total_steps is None
    assert "training steps" in plan.render() and "unknown: the dataset class or the sampler decides" in plan.render()
    assert plan_of(**sampler, trainer__total_training_steps=7).total_steps == 7
    (note,) = [note for note in plan.notes if "sampler" in note]
    assert "Mine chooses the training prompts; data.shuffle and data.seed have an effect on their order only if" in note
    # It may repeat rows, so a batch may be larger than the data.
    plan_of(**sampler, data__train_batch_size=64, actor_rollout_ref__actor__ppo_mini_batch_size=64)


def test_keys_that_a_sampler_may_read_are_no_unused_keys(plan_of, sampler):
    plan = plan_of(**sampler, data__shuffle=False, data__seed=3, data__sampler__kwargs="{a: 1}")
    assert not [note for note in plan.notes if note.startswith("no effect") and "data." in note]


def test_a_sampler_that_cannot_be_loaded_is_an_error(problem_of, problems_of, plan_of, sampler, tmp_path):
    path = sampler["data__sampler__class_path"]
    missing = problem_of(**sampler | {"data__sampler__class_path": tmp_path / "absent.py"})
    assert missing.startswith(f"data.sampler.class_path={tmp_path}/absent.py: ") and "no such file" in missing
    assert "has no class Other; it has AbstractSampler, Mine" in problem_of(
        **sampler | {"data__sampler__class_name": "Other"}
    )
    assert problem_of(data__sampler__class_path=path).startswith("data.sampler.class_name is not set")
    problem = problem_of(data__sampler__class_name="Mine", data__sampler__kwargs="{bucket_size: 3}")
    assert problem.startswith("data.sampler.bucket_size=3: data.sampler.class_path is not set")
    plan = plan_of(data__sampler__class_name="Mine")
    assert "no effect without your own sampler (data.sampler.class_path): data.sampler.class_name" in plan.notes


def test_a_sampler_excludes_partial_rollouts(problem_of, sampler):
    problem = problem_of(**sampler, actor_rollout_ref__rollout__partial_rollout=True, data__gen_batch_size=12)
    assert "data.sampler.class_path=" in problem and "partial_rollout=True: not supported" in problem
