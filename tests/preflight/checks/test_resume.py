"""The checkpoint that a run resumes from, and checkpoints that the same command could not resume."""

import dataclasses
import json

import pytest

from fixtures.dcp_metadata import write_metadata
from fixtures.run_files import with_overrides
from verl.config.record import write_record
from verl.preflight.checks.data import check_data
from verl.preflight.checks.resume import check_resume, describe_resume, warn_of_changed_inputs
from verl.preflight.findings import Findings
from verl.preflight.inputs import collect_inputs, data_seed, read_inputs, write_inputs
from verl.utils.checkpoint_files import TRACKER, write_manifest
from verl.utils.run_lock import run_lock

SAVE = "actor_rollout_ref__actor__checkpoint__save_contents"
LOAD = "actor_rollout_ref__actor__checkpoint__load_contents"


def write_parts(directory, shapes=None):
    """Write the parts of a model, of which only the shapes of its tensors matter."""
    for part in ("model", "optimizer"):
        (directory / part).mkdir(parents=True)
        write_metadata(directory / part, shapes or {})
    (directory / "engine.json").write_text("{}")


@pytest.fixture
def save(run_files):
    """A function that writes the checkpoint of a step of a run with these changes."""

    def write(step, **changes):
        directory = run_files.out / f"global_step_{step}"
        directory.mkdir(parents=True)
        (directory / "weights").write_text("weights")
        (directory / "data.pt").write_text("state")
        for model in ("actor", "critic"):
            write_parts(directory / model)
        config = with_overrides(run_files.overrides(**changes))
        write_record(config, directory)
        order = {"rows": 40, "shuffle": config.data.shuffle, "seed": data_seed(config)}
        if config.data.sampler.class_path:
            order = {"rows": 40, "sampler": config.data.sampler.class_name}
        write_inputs(dataclasses.replace(collect_inputs(config, "cpu"), data_order=order), directory)
        write_manifest(directory)
        (run_files.out / TRACKER).write_text(str(step))
        return directory

    return write


@pytest.fixture
def resume_of(run_files):
    """A function that returns the lines of the plan for the valid config with changes."""
    return lambda **changes: describe_resume(with_overrides(run_files.overrides(**changes)), "cpu")


@pytest.fixture
def resume_problem(run_files):
    """A function that returns the only problem of a resume with the valid config with changes."""

    def problem(**changes):
        config, found = with_overrides(run_files.overrides(**changes)), Findings()
        check_resume(config, check_data(config, found), found)
        [error] = found.errors
        return error

    return problem


def test_a_new_run_has_no_line(plan_of, save):
    assert plan_of().resume == []
    save(2)
    assert plan_of(trainer__resume_mode="disable").resume == []


def test_the_same_command_resumes_without_differences(plan_of, save):
    directory = save(2)
    plan = plan_of()
    assert plan.resume == [f"from step 2 ({directory})"]
    [line] = [line for line in plan.render().splitlines() if line.startswith("  resumes ")]
    assert line.endswith(f"  from step 2 ({directory})")


def test_other_model_data_reward_and_learning_rate_are_listed(plan_of, save, run_files, tmp_path):
    directory = save(2)
    other = tmp_path / "other"
    run_files.model.rename(other)
    train = run_files.write_prompts(tmp_path / "other.parquet", 40)
    reward = tmp_path / "other.py"
    reward.write_text(run_files.reward.read_text())
    plan = plan_of(
        actor_rollout_ref__model__path=other,
        data__train_files=train,
        reward__custom_reward_function__path=reward,
        actor_rollout_ref__actor__optim__lr=0.5,
        trainer__val_before_train=False,
    )
    assert plan.resume[:2] == [f"from step 2 ({directory})", "differs from that run:"]
    assert sorted(plan.resume[2:]) == sorted(
        [
            f"actor_rollout_ref.model.path: {run_files.model} -> {other}",
            f"data.train_files: {run_files.train} -> {train}",
            f"reward.custom_reward_function.path: {run_files.reward} -> {reward}",
            "actor_rollout_ref.actor.optim.lr: 1e-06 -> 0.5",
        ]
    )
    assert "differs from that run:" in plan.render()


NOT_COMPARED = "contents of files: not compared, because the checkpoint has no inputs.json"


def remove(directory, *names):
    for name in names:
        (directory / name).unlink()
    write_manifest(directory)


def test_a_checkpoint_without_a_record_uses_that_of_the_run_or_says_so(resume_of, save, run_files):
    directory = save(2)
    remove(directory, "config.yaml")
    assert resume_of()[1:] == ["differs from that run:", "config: not compared, because that run recorded none"]
    write_record(with_overrides(run_files.overrides(trainer__val_only=True, data__prompt_key="text")), run_files.out)
    assert resume_of()[1:] == ["differs from that run:", "data.prompt_key: text -> prompt"]


def test_a_checkpoint_without_inputs_says_so(resume_of, save):
    remove(save(2), "inputs.json")
    assert resume_of()[1:] == ["differs from that run:", NOT_COMPARED]


def test_other_contents_under_the_same_paths_are_listed(resume_of, save, run_files):
    (run_files.root / "helper.py").write_text("factor = 1\n")
    source = run_files.reward.read_text()
    run_files.reward.write_text(f"import helper\n{source}")
    save(2)
    run_files.write_prompts(run_files.train, 40, data_source="other")
    run_files.write_prompts(run_files.val, 5)
    (run_files.model / "tokenizer.json").write_text('{"version": 2}')
    (run_files.model / "chat_template.jinja").write_text("{{ messages }}")
    weights = bytearray(run_files.weights.read_bytes())
    weights[-1] ^= 1
    run_files.weights.write_bytes(weights)
    (run_files.root / "helper.py").write_text("factor = 2\n")
    assert resume_of()[1:] == [
        "differs from that run:",
        "actor_rollout_ref.model.path: content changed: model.safetensors, tokenizer.json; new: chat_template.jinja",
        "data.train_files: content changed: train.parquet",
        "data.val_files: content changed: val.parquet",
        "reward.custom_reward_function.path: content changed: helper.py",
    ]


def test_other_versions_are_listed(resume_of, save):
    directory = save(2)
    stored = json.loads((directory / "inputs.json").read_text())
    stored["versions"] |= {"torch": "1.0", "device": "cuda", "gone": "3"}
    stored["verl_code"] = "0"
    (directory / "inputs.json").write_text(json.dumps(stored))
    write_manifest(directory)
    now = read_inputs(save(1)).versions
    assert resume_of(trainer__resume_mode="resume_path", trainer__resume_from_path=directory)[1:] == [
        "differs from that run:",
        "device: cuda -> cpu",
        f"torch: 1.0 -> {now['torch']}",
        "gone: 3 -> none",
        f"verl: other source code under the same version {now['verl']}",
    ]


@pytest.mark.parametrize(
    ("rows", "keys", "text"),
    [
        (16, {}, "has 16 prompts, but the checkpoint is a position in the order of 40 prompts"),
        (48, {}, "has 48 prompts, but"),
        (40, {"data__train_max_samples": 24}, "has 24 prompts, but"),
        (16, {"data__filter_overlong_prompts": True}, "has 16 prompts, but"),
    ],
)
def test_a_position_in_other_prompts_is_an_error(resume_problem, save, run_files, rows, keys, text):
    save(2)
    run_files.write_prompts(run_files.train, rows)
    problem = resume_problem(**keys)
    assert problem.startswith(f"data.train_files={run_files.train}: {text}")
    assert "restore the files" in problem and "trainer.resume_mode=disable" in problem


def test_more_rows_may_be_dropped_by_the_filter(resume_of, save, run_files):
    save(2)
    run_files.write_prompts(run_files.train, 48)
    assert resume_of(data__filter_overlong_prompts=True)[2] == "data.train_files: content changed: train.parquet"


def test_a_position_in_another_order_is_an_error(resume_problem, resume_of, save):
    save(2)
    assert resume_problem(trainer__seed=3).startswith(
        "trainer.seed=3: the run that wrote the checkpoint ordered the prompts"
    )
    assert resume_problem(data__seed=3).startswith("data.seed=3: ")
    assert "set data.shuffle=True" in resume_problem(data__shuffle=False)
    lines = resume_of(trainer__seed=3, data__seed=0)
    assert lines[2:] == ["data.seed: null -> 0", "trainer.seed: 0 -> 3"]


def test_a_truncated_checkpoint_is_skipped_by_name(resume_of, resume_problem, save, run_files):
    first, second = save(2), save(4)
    (second / "weights").write_text("")
    damage = f"{second / 'weights'} has 0 bytes instead of 7"
    assert resume_of() == [f"from step 2 ({first})", f"skips global_step_4: {damage}"]
    chosen = {"trainer__resume_mode": "resume_path", "trainer__resume_from_path": second}
    assert resume_problem(**chosen).startswith(
        f"trainer.resume_from_path={second}: no complete checkpoint to resume from: "
    )
    (first / "weights").unlink()
    problem = resume_problem()
    assert problem.startswith(
        f"trainer.default_local_dir={run_files.out}: no complete checkpoint to resume from: {damage}"
    )
    assert f"{first / 'weights'} is missing" in problem


def test_later_checkpoints_that_the_tracker_does_not_name_are_listed(resume_of, save, run_files):
    first = save(2)
    save(4)
    last = save(6)
    (save(8) / "weights").unlink()
    (run_files.out / TRACKER).write_text("2\n")
    way_out = f"trainer.resume_mode=resume_path trainer.resume_from_path={last} resumes from the last one"
    unused = f"does not use the later checkpoints of steps 4, 6 ({TRACKER} names step 2)"
    assert resume_of() == [f"from step 2 ({first})", f"{unused}; {way_out}"]
    replaced = "; this run replaces each when it saves the same step"
    assert resume_of(trainer__save_freq=2)[1] == f"{unused}{replaced}; {way_out}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        ("seven", "contains 'seven' instead of a step"),
        ("9" * 5000, f"contains '{'9' * 80}' instead of a step"),
        ("6", "names step 6, but {out}/global_step_6 does not exist"),
        (None, "does not exist"),
        (NotADirectoryError, "cannot be read (Is a directory)"),
    ],
    ids=["empty", "word", "digits", "absent", "none", "directory"],
)
def test_a_tracker_file_without_a_step_is_named(resume_of, save, run_files, text, problem):
    save(2)
    newest, tracker = save(4), run_files.out / TRACKER
    tracker.unlink()
    if isinstance(text, str):
        tracker.write_text(text)
    elif text is not None:
        tracker.mkdir()
    problem = problem.format(out=run_files.out)
    first = f"from step 4 ({newest})"
    assert resume_of() == [first, f"{tracker} {problem}; this is the newest complete checkpoint"]


def test_resume_path_is_announced(resume_of, save):
    first, second = save(2), save(4)
    lines = resume_of(
        trainer__resume_mode="resume_path", trainer__resume_from_path=first, actor_rollout_ref__rollout__temperature=0.5
    )
    assert lines == [
        f"from step 2 ({first})",
        "does not use the later checkpoints of steps 4 (trainer.resume_from_path); trainer.resume_mode=resume_path "
        f"trainer.resume_from_path={second} resumes from the last one",
        "differs from that run:",
        "actor_rollout_ref.rollout.temperature: 1.0 -> 0.5",
    ]


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({SAVE: "[hf_model]"}, "save_contents=[hf_model]"),
        ({SAVE: "[model]", LOAD: "[model,optimizer]"}, "save_contents=[model]"),
        ({LOAD: "[optimizer,extra]"}, "load_contents=[optimizer,extra]"),
        ({LOAD: "[]"}, "load_contents=[]"),
        ({LOAD: "[hf_model]"}, "load_contents=[hf_model]"),
    ],
)
def test_checkpoints_that_the_same_command_cannot_resume_are_an_error(problem_of, plan_of, keys, named):
    problem = problem_of(trainer__save_freq=5, **keys)
    assert problem.startswith(f"actor_rollout_ref.actor.checkpoint.{named}: the same command could not resume")
    plan_of(trainer__save_freq=5, trainer__resume_mode="disable", **keys)
    plan_of(trainer__save_freq=-1, **keys)


def test_a_checkpoint_without_the_optimizer_is_a_warning(plan_of):
    plan = plan_of(trainer__save_freq=5, **{SAVE: "[model,hf_model]"})
    [warning] = [text for text in plan.warnings if "checkpoint" in text]
    assert "does not load the optimizer's moments and learning-rate schedule and random numbers" in warning


def test_the_critic_is_checked_too(problem_of, run_files):
    keys = {"algorithm__adv_estimator": "gae", "critic__model__path": run_files.model}
    problem = problem_of(trainer__save_freq=5, critic__checkpoint__save_contents="[hf_model]", **keys)
    assert problem.startswith("critic.checkpoint.save_contents=[hf_model]: ")


def test_a_directory_of_a_running_run_is_an_error(problem_of, run_files):
    with run_lock(run_files.out):
        assert "another run (process " in problem_of()


def test_a_new_run_among_the_checkpoints_of_another_is_a_note(plan_of, save, run_files):
    save(2), save(4)
    [note] = [text for text in plan_of(trainer__resume_mode="disable", trainer__save_freq=2).notes if "holds" in text]
    assert note.startswith(
        f"trainer.resume_mode=disable: {run_files.out} holds checkpoints of an earlier run (steps 2, 4)"
    )
    assert not [text for text in plan_of(trainer__resume_mode="disable").notes if "holds" in text]


def test_problems_of_the_checkpoint_are_problems_of_the_config(problem_of, save, run_files):
    (save(2) / "weights").unlink()
    assert problem_of().startswith(
        f"trainer.default_local_dir={run_files.out}: no complete checkpoint to resume from: "
    )


def test_the_log_warns_of_changed_inputs(save, run_files, caplog):
    directory, config = save(2), with_overrides(run_files.overrides())
    warn_of_changed_inputs(directory, collect_inputs(config, "cpu"))
    assert caplog.text == ""
    run_files.write_prompts(run_files.train, 40, data_source="other")
    warn_of_changed_inputs(directory, collect_inputs(config, "cpu"))
    change = "data.train_files: content changed: train.parquet"
    assert [record.getMessage() for record in caplog.records] == [
        f"differs from the run that wrote {directory}: {change}"
    ]
    (directory / "inputs.json").unlink()
    caplog.clear()
    warn_of_changed_inputs(directory, collect_inputs(config, "cpu"))
    assert f"{directory} has no inputs.json" in caplog.text


def test_a_resume_with_another_sampler_is_refused(plan_of, problem_of, save, tmp_path):
    path = tmp_path / "sampler.py"
    path.write_text("class Mine: pass\nclass Other: pass\n")
    mine = {"data__sampler__class_path": path, "data__sampler__class_name": "Mine"}
    save(2, **mine)
    # The order does not depend on shuffling and seed.
    plan_of(**mine, data__seed=9, data__shuffle=False)
    for changes, now in (({}, "null"), (mine | {"data__sampler__class_name": "Other"}, "Other")):
        problem = problem_of(**changes)
        assert problem.startswith(f"data.sampler.class_name={now}: the run that wrote the checkpoint had Mine")
    save(4)
    problem = problem_of(**mine)
    assert problem.startswith("data.sampler.class_name=Mine: the run that wrote the checkpoint had null")


def test_a_run_without_a_step_left_is_a_warning(plan_of, save):
    directory = save(5)
    [warning] = [text for text in plan_of(trainer__total_epochs=1).warnings if "nothing is left" in text]
    assert warning.startswith("trainer.total_epochs=1: the run ends after step 5 and resumes from step 5 (")
    assert str(directory) in warning and "raise trainer.total_epochs" in warning
    [warning] = [text for text in plan_of(trainer__total_training_steps=3).warnings if "nothing is left" in text]
    assert warning.startswith("trainer.total_training_steps=3: the run ends after step 3 and resumes from step 5 (")
    for keys in ({"trainer__total_epochs": 2}, {"trainer__val_only": True}, {"trainer__resume_mode": "disable"}):
        plan = plan_of(**{"trainer__total_epochs": 1, **keys})
        assert not [text for text in plan.warnings if "nothing is left" in text]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", "[" * 5000, '{"format": 1}', '{"format": 1, "files": [], "versions": 3, "verl_code": 1}'],
)
def test_damaged_inputs_are_not_compared(plan_of, save, text):
    directory = save(2)
    (directory / "inputs.json").write_text(text)
    write_manifest(directory)
    assert NOT_COMPARED in plan_of().resume


@pytest.mark.parametrize(
    "text", ["", "a: &me [*me]", "[" * 3000, "trainer: 2026-13-45", "- 1", "trainer: {seed: !!int x}"]
)
def test_a_damaged_record_is_not_compared(plan_of, save, text):
    directory = save(2)
    (directory / "config.yaml").write_text(text)
    write_manifest(directory)
    assert plan_of().resume[1] == "differs from that run:"


def test_text_in_a_checkpoint_cannot_steer_the_terminal(plan_of, save):
    directory = save(2)
    record = (directory / "config.yaml").read_text().replace("prompt_key: prompt", 'prompt_key: "\\e[2J"')
    (directory / "config.yaml").write_text(record + '"\\e[31mkey": 1\n')
    write_manifest(directory)
    text = plan_of().render()
    assert "\x1b" not in text and "␛[2J" in text and "␛[31mkey" in text
