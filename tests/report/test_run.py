"""Read runs in every state: complete, running, failed, damaged, moved."""

import json
import math
import os
import time

import pytest
import yaml

from verl.report.run import read_runs
from verl.report.summary import about, facts, state


def read(directory):
    (run,) = read_runs([directory])
    return run


def test_a_complete_run(make_run):
    run = read(make_run("whole"))
    assert run.name == "whole"
    assert list(run.records) == list(range(1, 21))
    assert run.curve("critic/score/mean")[1][0] == pytest.approx(0.23)
    assert run.curve("no/such") == ([], [])
    assert run.config["actor_rollout_ref.rollout.quantization"] == "ascend"
    assert run.changes == {"data.train_batch_size": {"value": 8, "default": 1024}}
    assert run.timeline == run.directory / "timeline.json"
    assert [list(run.dumps[kind]) for kind in ("validation", "rollouts")] == [[20], [20]]
    assert run.notes == []
    assert state(run) == "finished, 20 steps"
    assert about(run) == "p / e · model tiny/model · advantages grpo · rollout quantized: ascend"


def test_an_incomplete_last_line_is_left_out_with_a_note(make_run):
    directory = make_run("half", steps=5)
    with open(directory / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "da')
    run = read(directory)
    assert max(run.records) == 5
    assert run.notes == ["One line is damaged in metrics.jsonl and skipped: the run was writing, or was killed."]


@pytest.mark.parametrize(("age", "says"), [(0, "running or just stopped"), (7200, "ended, or stopped")])
def test_an_unfinished_run_shows_the_time_since_its_last_record(make_run, age, says):
    directory = make_run("going", steps=5)
    then = time.time() - age
    os.utime(directory / "metrics.jsonl", (then, then))
    assert state(read(directory)).startswith(f"at step 5 of 20; {says}: last record ")


def test_each_missing_file_has_a_note(make_run):
    directory = make_run("bare", config=None)
    for path in [*directory.glob("*/*.jsonl"), directory / "timeline.json"]:
        path.unlink()
    notes = read(directory).notes
    starts = (
        "No config.yaml",
        "No config_changes.yaml",
        "No samples of the val",
        "No samples of the tr",
        "No timeline",
    )
    assert len(notes) == len(starts)
    assert all(note.startswith(start) for note, start in zip(notes, starts, strict=True))


def test_the_note_names_the_key_that_turned_a_file_off(make_run):
    off = {"validation_data_dir": None, "rollout_data_dir": None, "timeline": None, "logger": ["console"]}
    directory = make_run("off", config={"trainer": off})
    for path in directory.rglob("*.json*"):
        path.unlink()
    notes = " ".join(read(directory).notes)
    assert "trainer.logger does not list 'file'" in notes
    assert "trainer.validation_data_dir is null" in notes
    assert "trainer.rollout_data_dir is null" in notes
    assert "trainer.timeline is null" in notes


def test_a_run_that_failed_before_its_first_step(make_run):
    directory = make_run("failed", steps=1)
    (directory / "metrics.jsonl").unlink()
    run = read(directory)
    assert state(run) == "no step is recorded"
    assert facts([run]) == []
    assert any("failed before the first one" in note for note in run.notes)
    (directory / "metrics.jsonl").write_text("")
    assert any("has no record yet" in note for note in read(directory).notes)


def test_a_value_that_is_not_finite_is_a_gap_with_a_note(make_run):
    directory = make_run("nan", steps=3)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    lines[1]["data"] |= {"actor/grad_norm": None, "reward/num_errors": 2.0}
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read(directory)
    steps, values = run.curve("actor/grad_norm")
    assert steps == [1, 2, 3]
    assert [math.isnan(value) for value in values] == [False, True, False]
    assert run.notes == [
        "actor/grad_norm is not a finite number in step 2, and may be in others.",
        "The reward function raised an error for 2 samples.",
    ]


def test_a_config_that_is_not_yaml_has_a_note(make_run):
    directory = make_run("damaged")
    (directory / "config.yaml").write_text("a: [1,\nb: {")
    run = read(directory)
    assert run.config == {}
    assert run.notes[0].startswith("config.yaml cannot be read: ")


def test_dumps_are_found_at_the_configured_path_and_after_a_move(make_run, tmp_path):
    directory = make_run("moved")
    before, elsewhere = make_run("before"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "3.jsonl").write_text("")
    places = {
        "default_local_dir": str(before),
        "rollout_data_dir": str(elsewhere),
        "validation_data_dir": str(before / "validation"),
        "timeline": str(before / "timeline.json"),
    }
    (directory / "config.yaml").write_text(yaml.safe_dump({"trainer": places}))
    run = read(directory)
    assert run.dumps["rollouts"] == {3: elsewhere / "3.jsonl"}
    assert run.dumps["validation"] == {20: directory / "validation" / "20.jsonl"}
    assert run.timeline == directory / "timeline.json"


def test_dumps_of_an_earlier_longer_run_are_left_out(make_run):
    directory = make_run("again", steps=5)
    (directory / "rollouts" / "9.jsonl").write_text("")
    assert list(read(directory).dumps["rollouts"]) == [5]


def test_names_are_long_enough_to_be_unique(make_run):
    runs = read_runs([make_run("a/run"), make_run("b/run")])
    assert [run.name for run in runs] == ["a/run", "b/run"]
    again = read_runs([runs[0].directory, runs[0].directory / ".." / "run"])
    assert [run.name for run in again] == ["run"]


def test_a_directory_without_a_run_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match=r"contains neither .*; give trainer\.default_local_dir"):
        read_runs([tmp_path])
    with pytest.raises(ValueError, match="missing is not a directory"):
        read_runs([tmp_path / "missing"])


def test_facts_of_two_runs_are_shown_together(make_run):
    runs = read_runs([make_run("one"), make_run("two", level=0.1)])
    values = {fact.label: fact.values for fact in facts(runs)}
    assert values["Reward in training"] == ["0.29 → 0.74", "0.39 → 0.84"]
    assert values["Validation: acc, spell"] == ["0.4 → 0.8", "0.4 → 0.8"]
    assert values["Time of a step"] == ["3.5 s", "3.5 s"]
    assert values["Throughput"] == ["4,321 tokens/s", "4,321 tokens/s"]
    assert values["Quantization error"] == ["3.4 %", "3.4 %"]


def test_the_ends_of_a_short_run_do_not_overlap(make_run):
    """Scores start at 0.23 and rise by 0.03 per step."""
    for steps, said in ((1, "0.23"), (2, "0.23 → 0.26"), (3, "0.23 → 0.29"), (4, "0.245 → 0.305")):
        values = {fact.label: fact.values for fact in facts(read_runs([make_run(f"of {steps}", steps=steps)]))}
        assert values["Reward in training"] == [said]
