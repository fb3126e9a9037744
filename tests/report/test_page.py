"""The page is complete, escaped and self-contained; the command writes it."""

import argparse
import json
import re

import pytest

from verl.cli import report as command
from verl.report.page import write_report
from verl.report.run import read_runs
from verl.report.samples import read_samples
from verl.report.settings import rows
from verl.report.text import visible

TITLES = (
    "Reward in training",
    "Validation: gym/spell",
    "Entropy",
    "KL divergence",
    "Gradient norm",
    "Probabilities: rollout against trainer",
    "Correction: effective sample size",
    "Largest quantization error of a weight",
    "Timeline of a step: step 20",
    "Memory of the trainer",
)
EVIL = "<script>document.title='owned'</script>&amp;</pre>"


def parse(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def test_everything_is_in_one_file(make_run):
    text = write_report([make_run("run")], make_run("other") / "report.html").read_text()
    for title in TITLES:
        assert f"<h3>{title}</h3>" in text, title
    assert "Correction: rejected - algorithm.rollout_correction is off" in text
    assert "answer 11" in text
    assert "data.train_batch_size" in text
    links = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')\s>]+)', text)
    assert links
    assert all(link.startswith("#") for link in links)
    assert "<script" not in text


def evil_samples(step):
    evil = {"input": EVIL, "output": EVIL, "gts": EVIL, "score": 1.0, "step": step, EVIL: EVIL}
    return [evil, {"input": "\x00\x1b[31m\ud800", "output": 7, "gts": None, "score": 0.5, "step": step}]


@pytest.mark.slow
def test_text_from_a_run_is_shown_and_never_executed(make_run):
    config = {"data": {EVIL: EVIL}, "trainer": {"experiment_name": EVIL}}
    directory = make_run("<img src=x onerror=alert(1)>", samples=evil_samples, config=config)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["data"]["weight_update/max_quantization_error_layer"] = EVIL
        line["data"][f"val-core/{EVIL.replace('/', '')}/acc/mean@4"] = 0.5
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "config_changes.yaml").write_text(json.dumps({f"data.{EVIL}": {"value": EVIL, "default": EVIL}}))
    for runs in ([directory], [directory, make_run("two")]):
        text = write_report(runs, directory / "report.html").read_text()
        assert "<script" not in text
        assert "<img" not in text
        assert text.count("&lt;script&gt;document.title") > 5
    assert "␀␛[31m\ufffd" in text


def test_long_text_is_truncated():
    assert visible("a" * 4010) == "a" * 4000 + " … 10 more characters"


def test_best_and_worst_show_each_prompt_once(make_run):
    (run,) = read_runs([make_run("run")])
    validation, training = read_samples(run)
    assert (validation.title, validation.step, validation.count, training.title) == ("Validation", 20, 12, "Training")
    assert [sample.score for sample in validation.best] == ["1.1", "0.9", "0.7", "0.5"]
    assert [sample.score for sample in validation.worst] == ["0", "0.2", "0.4", "0.6"]
    assert validation.best[0].more == (("acc", "1"),)


def test_prompts_with_the_same_text_are_different_prompts(make_run):
    def samples(step):
        common = {"input": "the same", "output": "", "step": step}
        rows = [{**common, "gts": index // 2, "score": index / 10, "uid": f"0.{index // 2}"} for index in range(6)]
        return rows if step == 20 else [{name: value for name, value in row.items() if name != "uid"} for row in rows]

    (run,) = read_runs([make_run("run", samples=samples)])
    for found in read_samples(run):
        assert [(sample.score, sample.truth) for sample in found.best] == [("0.5", "2"), ("0.3", "1"), ("0.1", "0")]
        assert all(sample.more == () for sample in found.best)


def test_a_dump_without_a_score_is_a_note(make_run):
    (run,) = read_runs([make_run("run", samples=lambda step: [{"step": step, "score": None}])])
    assert read_samples(run) == []
    assert len(run.notes) == 2


def test_settings_that_differ_come_first(make_run):
    other = {"data": {"max_response_length": 128, "train_batch_size": 8}}
    runs = read_runs([make_run("one"), make_run("two", config=other), make_run("three", config=None)])
    table = rows(runs)
    by_key = {row.key: row for row in table}
    assert by_key["data.max_response_length"].values == ["64", "128", "not known"]
    assert by_key["data.train_batch_size"].default == "1024"
    assert not by_key["data.train_batch_size"].differs
    assert [row.differs for row in table] == sorted((row.differs for row in table), reverse=True)


@pytest.mark.slow
def test_the_command_prints_the_path(make_run, capsys, tmp_path):
    directory = make_run("run")
    assert command.run(parse(directory, "--png", tmp_path / "pngs")) == 0
    assert capsys.readouterr().out == f"{directory / 'report.html'}\n"
    assert (directory / "report.html").stat().st_size > 50_000
    names = {path.name for path in (tmp_path / "pngs").iterdir()}
    assert names >= {"reward.png", "timeline.png", "quantization_error.png", "stages.png"}
    assert command.run(parse(directory, make_run("two"), "-o", tmp_path / "deep" / "both.html")) == 0
    assert "one and two" not in capsys.readouterr().out
    assert "<title>run and two - verl report</title>" in (tmp_path / "deep" / "both.html").read_text()


def test_a_missing_run_ends_with_status_1_and_names_the_directory(tmp_path, capsys):
    assert command.run(parse(tmp_path / "nowhere")) == 1
    assert "nowhere is not a directory" in capsys.readouterr().err


@pytest.mark.parametrize("missing", [["metrics.jsonl"], ["config.yaml", "config_changes.yaml", "timeline.json"]])
def test_the_page_shows_the_rest_if_files_are_missing(make_run, missing):
    directory = make_run("run")
    for name in missing:
        (directory / name).unlink()
    text = write_report([directory], directory / "report.html").read_text()
    assert all(f"No {name}" in text or name == "timeline.json" for name in missing)
    assert "answer 11" in text
    assert ("Reward in training</h3>" in text) == ("metrics.jsonl" not in missing)
