"""The summary of the quickstart, for metrics written by hand."""

import json
import re
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def script(load_example):
    return load_example("quickstart/summary.py")


def write(directory, records):
    directory.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step, "data": data}) + "\n" for step, data in records]
    (directory / "metrics.jsonl").write_text("".join(lines))


def value_of(text: str, label: str) -> str:
    lines = [line for line in text.splitlines() if line.strip().startswith(label)]
    assert len(lines) == 1, (label, text)
    return re.split(r" {2,}", lines[0].strip(), maxsplit=1)[1]


def mismatch(largest):
    names = ("training/rollout_probs_diff_max", "training/rollout_probs_diff_mean", "rollout_corr/k3_kl")
    return dict(zip(names, (largest, largest / 10, largest / 100), strict=True))


def quantized(error, layer):
    prefix = "weight_update/max_quantization_error"
    return {prefix: error, f"{prefix}_layer": layer}


RUN = [
    (
        0,
        {
            "val-core/gym/spell/acc/mean@4": 0.02,
            "val-aux/gym/spell/reward/mean@4": 0.31,
            "val-aux/gym/spell/acc/std@4": 0.1,
        },
    ),
    (1, {"timing_s/step": 2.0, "timing_s/gen": 1.5, **mismatch(2e-6), **quantized(0.031, "model.layers.0.a")}),
    (2, {"timing_s/step": 1.0, "timing_s/gen": 0.5, **mismatch(7e-6), **quantized(0.033, "model.layers.1.b")}),
    (
        3,
        {
            "timing_s/step": 4.0,
            "timing_s/gen": 0.7,
            "timing_s/testing": 2.5,
            **mismatch(1e-6),
            **quantized(0.032, "model.layers.2.c"),
            "val-core/gym/spell/acc/mean@4": 0.91,
            "val-aux/gym/spell/reward/mean@4": 0.97,
        },
    ),
]


def test_a_complete_run(script, tmp_path):
    write(tmp_path, RUN)
    (tmp_path / "global_step_3").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    report = tmp_path / "report.html"
    text = script.render(tmp_path, wall_seconds=90.4, next_commands=["make coffee"], report=report)
    assert value_of(text, "mean reward, held-out gym/spell (4 samples each)") == "0.310 -> 0.970  (step 0 -> 3)"
    assert value_of(text, "right answers, held-out gym/spell (4 samples each)") == "0.020 -> 0.910  (step 0 -> 3)"
    assert value_of(text, "mean |p_rollout - p_trainer|") == "2.0e-07  (median of the steps)"
    assert value_of(text, "largest of any token") == "7.0e-06  (step 2 of 3)"
    assert value_of(text, "KL of rollout and trainer") == "2.0e-08  (median of the steps)"
    assert value_of(text, "largest quantization error") == "3.30%  (model.layers.1.b)"
    assert value_of(text, "generation") == "0.70 s"  # the median of 1.5, 0.5, 0.7
    assert value_of(text, "whole step") == "2.00 s"
    assert value_of(text, "validation") == "2.50 s"
    assert value_of(text, "total") == "90 s, of which 7 s for 3 steps"
    assert value_of(text, "log") == str(tmp_path / "metrics.jsonl")
    assert value_of(text, "checkpoint ") == str(tmp_path / "global_step_3")
    assert value_of(text, "report, for a browser") == str(report)
    assert text.splitlines()[-1].strip() == "make coffee"
    columns = {
        line.index(value) for line in text.splitlines() for value in ("0.310", "7.0e-06", "90 s") if value in line
    }
    assert len(columns) == 1


def test_acc_is_shown_once_if_the_scorer_returns_a_number(script, tmp_path):
    both = {"val-core/gym/x/acc/mean@2": 0.5, "val-aux/gym/x/reward/mean@2": 0.5}
    write(tmp_path, [(0, both), (5, both)])
    text = script.render(tmp_path)
    assert "mean reward" in text
    assert "right answers" not in text


def test_without_validation_the_training_reward_is_shown(script, tmp_path):
    write(tmp_path, [(1, {"critic/score/mean": 0.1}), (9, {"critic/score/mean": 0.6})])
    text = script.render(tmp_path)
    assert value_of(text, "mean reward in training") == "0.100 -> 0.600  (step 1 -> 9)"
    assert "rollout" not in text.lower()
    assert value_of(text, "checkpoint ") == "none"


def test_a_run_stopped_after_the_first_validation(script, tmp_path):
    write(tmp_path, RUN[:1])
    text = script.render(tmp_path)
    assert value_of(text, "mean reward") == "0.310  (step 0)"
    assert "total" not in text


def test_unusual_values_and_a_truncated_line_are_accepted(script, tmp_path):
    write(tmp_path, [(1, {"timing_s/step": None, "note": "text", "val-core/short": 1.0}), (2, {"timing_s/step": 1.25})])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "da')
    assert value_of(script.render(tmp_path), "whole step") == "1.25 s"


@pytest.mark.parametrize(
    ("content", "says"), [(None, "does not exist"), ("", "has no metrics"), ("[1]\n", "has no metrics")]
)
def test_a_run_without_metrics_is_an_error(script, tmp_path, content, says):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    command = [sys.executable, script.__file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
