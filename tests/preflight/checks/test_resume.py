"""The checkpoint that a run resumes from, and checkpoints that the same command could not resume."""

import pytest

from fixtures.run_files import with_overrides
from verl.config.record import write_record
from verl.utils.checkpoint_files import TRACKER, write_manifest
from verl.utils.run_lock import run_lock

SAVE = "actor_rollout_ref__actor__checkpoint__save_contents"
LOAD = "actor_rollout_ref__actor__checkpoint__load_contents"


@pytest.fixture
def save(run_files):
    """A function that writes the checkpoint of a step of a run with these changes."""

    def write(step, **changes):
        directory = run_files.out / f"global_step_{step}"
        directory.mkdir(parents=True)
        (directory / "weights").write_text("weights")
        write_record(with_overrides(run_files.overrides(**changes)), directory)
        write_manifest(directory)
        (run_files.out / TRACKER).write_text(str(step))
        return directory

    return write


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
    train = run_files.write_prompts(tmp_path / "other.parquet", 16)
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


def test_a_checkpoint_without_a_record_uses_that_of_the_run_or_says_so(plan_of, save, run_files):
    directory = save(2)
    (directory / "config.yaml").unlink()
    write_manifest(directory)
    assert plan_of().resume[1:] == ["differences from that run: unknown, because it recorded no config"]
    write_record(with_overrides(run_files.overrides(trainer__seed=3)), run_files.out)
    assert plan_of().resume[1:] == ["differs from that run:", "trainer.seed: 3 -> 0"]


def test_a_truncated_checkpoint_is_not_announced(plan_of, save):
    first, second = save(2), save(4)
    (second / "weights").write_text("")
    assert plan_of().resume == [f"from step 2 ({first})"]


def test_resume_path_is_announced(plan_of, save):
    first = save(2)
    save(4)
    plan = plan_of(trainer__resume_mode="resume_path", trainer__resume_from_path=first, trainer__seed=4)
    assert plan.resume == [f"from step 2 ({first})", "differs from that run:", "trainer.seed: 0 -> 4"]


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
