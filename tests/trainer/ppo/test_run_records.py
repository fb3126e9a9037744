"""The records of several runs in one directory: none is written before its run has begun, and none replaces another."""

import json
import os

import pytest

from verl.config import PPOConfig
from verl.config.record import VAL_ONLY_DIRECTORY
from verl.report.run import read_runs
from verl.timeline.spans import close_timeline, open_timeline, span
from verl.trainer.ppo.run_records import begin_records
from verl.utils.tracking import Tracking, tracker
from verl.utils.tracking.jsonl import read_steps


def files_of(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def attempt(tmp_path):
    """Run an attempt: start, then perhaps begin, and log steps. Return its directory."""
    directory = tmp_path / "run"

    def run(lr, steps, begins=True, continues=False, logger=("file",), timeline=directory / "timeline.json", **keys):
        config = PPOConfig()
        trainer = config.trainer
        config.actor_rollout_ref.actor.optim.lr = lr
        trainer.default_local_dir, trainer.timeline = str(directory), None if timeline is None else str(timeline)
        trainer.rollout_data_dir, trainer.logger = str(directory / "dumps" / "rollouts"), list(logger)
        for name, value in keys.items():
            setattr(trainer, name, value)
        place = directory / VAL_ONLY_DIRECTORY / "global_step_3" if trainer.val_only else directory
        if timeline is not None:
            open_timeline(timeline)
        step = min(steps) - 1 if continues else None
        try:
            with span(f"start with {lr}"):
                pass
            if not begins:
                return directory
            with Tracking(
                *("p", "e", trainer.logger),
                default_local_dir=place,
                resume_step=step,
                before_files=lambda: begin_records(config, place, resume_step=step),
            ) as tracking:
                for number in steps:
                    tracking.log({"actor/lr": lr}, number)
                    if not trainer.val_only:
                        folder = directory / "dumps" / "rollouts"
                        folder.mkdir(parents=True, exist_ok=True)
                        (folder / f"{number}.jsonl").write_text(json.dumps({"step": number, "score": lr}) + "\n")
        finally:
            close_timeline()
        return directory

    return run


def seen(directory):
    """Return the learning rate in the config and those of the curve, as a report sees them."""
    [run] = read_runs([directory])
    return run.config["actor_rollout_ref.actor.optim.lr"], run.curve("actor/lr")[1]


def test_an_attempt_that_fails_while_it_starts_changes_no_record(attempt):
    directory = attempt(0.1, [1, 2, 3])
    before = files_of(directory)
    attempt(0.9, [], begins=False)
    attempt(0.8, [], begins=False, val_only=True)
    after = files_of(directory)
    assert after.pop("timeline.json.starting").count(b"start with 0.8") == 1
    assert after == before


def test_a_new_run_keeps_the_earlier_ones_whole(attempt):
    directory = attempt(0.1, [1, 2, 3])
    first = files_of(directory)
    attempt(0.9, [1])
    attempt(0.5, [1, 2])
    assert seen(directory) == (0.5, [0.5, 0.5])
    assert seen(directory / "previous_1") == (0.1, [0.1, 0.1, 0.1])
    assert seen(directory / "previous_2") == (0.9, [0.9])
    assert files_of(directory / "previous_1") == first
    assert sorted(path.name for path in (directory / "dumps" / "rollouts").iterdir()) == ["1.jsonl", "2.jsonl"]
    assert "start with 0.5" in (directory / "timeline.json").read_text()
    assert not os.path.lexists(directory / "timeline.json.starting")
    [run] = read_runs([directory / "previous_2"])
    assert run.timeline == directory / "previous_2" / "timeline.json"
    assert list(run.dumps["rollouts"]) == [1]


def test_a_run_that_logged_nothing_is_not_kept(attempt):
    directory = attempt(0.1, [])
    attempt(0.2, [1])
    assert seen(directory) == (0.2, [0.2])
    assert not os.path.lexists(directory / "previous_1")


def test_a_resumed_run_continues_its_records_and_keeps_another_config(attempt):
    directory = attempt(0.1, [1, 2, 3])
    attempt(0.1, [3, 4], continues=True)
    assert not os.path.lexists(directory / "config.yaml.previous")
    attempt(0.7, [4, 5], continues=True)
    attempt(0.8, [5, 6], continues=True)
    assert seen(directory) == (0.8, [0.1, 0.1, 0.1, 0.7, 0.8, 0.8])
    assert not os.path.lexists(directory / "previous_1")
    assert "lr: 0.1" in (directory / "config.yaml.previous").read_text()
    assert "lr: 0.7" in (directory / "config.yaml.previous_2").read_text()
    assert "start with 0.1" in (directory / "timeline.json.previous").read_text()
    assert "start with 0.7" in (directory / "timeline.json.previous_3").read_text()
    [run] = read_runs([directory])
    assert any("resumed with another config" in note for note in run.notes)


def test_a_run_that_resumes_does_not_continue_the_metrics_of_another_run(attempt):
    directory = attempt(0.1, range(1, 9))
    attempt(0.2, [1, 2])
    attempt(0.3, [7, 8], continues=True)
    assert seen(directory) == (0.3, [0.3, 0.3])
    assert seen(directory / "previous_2") == (0.2, [0.2, 0.2])


def test_a_validation_alone_has_records_of_its_own(attempt):
    directory = attempt(0.1, [1, 2, 3])
    before = files_of(directory)
    for lr in (0.4, 0.6):
        attempt(lr, [3], val_only=True)
    after = files_of(directory)
    assert {name: after[name] for name in before} == before
    folder = directory / VAL_ONLY_DIRECTORY / "global_step_3"
    assert "start with 0.6" in (folder / "timeline.json").read_text()
    assert "start with 0.4" in (folder / "previous_1" / "timeline.json").read_text()
    assert read_steps(folder / "previous_1" / "metrics.jsonl") == [{"step": 3, "data": {"actor/lr": 0.4}}]


def test_a_timeline_outside_of_the_directory_is_renamed(attempt, tmp_path):
    for lr in (0.1, 0.2, 0.3):
        attempt(lr, [1], timeline=tmp_path / "trace.json")
    for name, lr in (("trace.json", 0.3), ("trace.json.previous", 0.1), ("trace.json.previous_2", 0.2)):
        assert f"start with {lr}" in (tmp_path / name).read_text()


def test_a_tracker_that_cannot_be_opened_changes_no_record(attempt, monkeypatch):
    directory = attempt(0.1, [1, 2, 3], timeline=None)
    before = files_of(directory)

    def refuse(*arguments):
        raise RuntimeError("no account")

    monkeypatch.setattr(tracker, "WandbBackend", refuse)
    with pytest.raises(ValueError, match="'wandb' cannot be opened"):
        attempt(0.9, [1], logger=("file", "wandb"), timeline=None)
    assert files_of(directory) == before


def test_a_directory_of_samples_that_holds_the_run_stays(attempt, tmp_path):
    directory = attempt(0.1, [1], rollout_data_dir=str(tmp_path), validation_data_dir=str(tmp_path / "run"))
    attempt(0.2, [1], rollout_data_dir=str(tmp_path), validation_data_dir=str(tmp_path / "run"))
    assert seen(directory / "previous_1") == (0.1, [0.1])
    assert (directory / "dumps").is_dir()
