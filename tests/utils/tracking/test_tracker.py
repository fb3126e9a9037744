"""Tracking: selection of backends, logged values, and secrets that no backend receives."""

import importlib.util
import io
import json
import logging
import pickle
import sys

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from verl.utils.tracking import Tracking, read_steps, tracker
from verl.utils.tracking.console import ConsoleBackend, format_line

CONFIG = {"trainer": {"total_epochs": 1}, "wandb_api_key": "hidden-value"}
ROWS = [{"input": "spell cat", "output": "tac", "score": 1.0}]


def make(tmp_path, backends, **more):
    return Tracking("project", "experiment", backends, CONFIG, tmp_path, **more)


def test_file_and_console_receive_the_metrics(tmp_path, capsys):
    tracking = make(tmp_path, ["file", "console"], file_path=tmp_path / "m.jsonl", total_steps=2)
    tracking.log({"critic/score/mean": np.float32(0.25), "actor/lr": torch.tensor(1e-3), "n": np.int64(2)}, step=1)
    tracking.log_generations(ROWS, step=1)
    tracking.finish()
    tracking.finish()
    assert read_steps(tmp_path / "m.jsonl") == [
        {"step": 1, "data": {"critic/score/mean": 0.25, "actor/lr": pytest.approx(1e-3), "n": 2}}
    ]
    assert read_steps(tmp_path / "generations.jsonl") == [{"step": 1, "generations": ROWS}]
    line, sample = capsys.readouterr().out.splitlines()
    assert line.startswith("step 1/2  score 0.250  lr 1.0e-03  ") and line.endswith(" left")
    assert sample == "step 1  sample  score 1.000  spell cat -> tac"


def test_the_file_goes_below_the_run_directory_by_default(tmp_path):
    with make(tmp_path / "run", ["file"]) as tracking:
        tracking.log({"a": 1}, 1)
    assert read_steps(tmp_path / "run" / "metrics.jsonl") == [{"step": 1, "data": {"a": 1}}]


def test_a_step_can_be_logged_to_the_file_first(tmp_path, capsys):
    with make(tmp_path, ["console", "file"]) as tracking:
        tracking.log({"critic/score/mean": 0.5}, 1, backend=["file", "tensorboard"])
        assert capsys.readouterr().out == ""
        tracking.log({"critic/score/mean": 0.5, "timing_s/save_checkpoint": 2.0}, 1)
    assert capsys.readouterr().out == "step 1  score 0.500\n"
    data = {"critic/score/mean": 0.5, "timing_s/save_checkpoint": 2.0}
    assert read_steps(tmp_path / "metrics.jsonl") == [{"step": 1, "data": data}]


def test_a_value_without_plain_form_names_its_metric(tmp_path):
    with make(tmp_path, ["file"]) as tracking, pytest.raises(TypeError, match=r"metric 'actor/loss': .*Tensor"):
        tracking.log({"actor/loss": torch.zeros(3)}, 1)


def test_unknown_and_unsupported_backends_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"unknown backend 'fiel'; use any of \['console', 'file'"):
        make(tmp_path, ["console", "fiel"])
    with pytest.raises(NotImplementedError, match="'mlflow' is not supported yet"):
        make(tmp_path, ["mlflow"])


def test_arguments_have_the_names_and_the_defaults_of_upstream(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Tracking(project_name="p", experiment_name="e", default_backend="file", config={"a": 1}) as tracking:
        tracking.log({"x": 1.0}, step=1)
    assert list((tmp_path / "checkpoints/p/e").iterdir()) == [tmp_path / "checkpoints/p/e/metrics.jsonl"]
    with Tracking(project_name="p", experiment_name="e") as tracking:
        tracking.log({"x": 1.0}, step=1)


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_backend_that_is_not_installed_names_the_extra(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # what Python does for a module that cannot be imported
    with pytest.raises(ValueError, match=rf"trainer\.logger: '{name}'.*pip install 'verl\[{name}\]'") as caught:
        make(tmp_path, ["file", name])
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def scalars_of(directory, tag):
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_purges_later_steps_on_resume(tmp_path):
    for run, (first, last, resume_step) in enumerate([(1, 5, None), (4, 6, 3)]):
        with make(tmp_path, ["tensorboard"], resume_step=resume_step) as tracking:
            for step in range(first, last + 1):
                tracking.log({"critic/score/mean": step / 8, "run": run, "note": "text"}, step)
            tracking.log_generations(ROWS, last)
    directory = tmp_path / "tensorboard"
    assert scalars_of(directory, "critic/score/mean") == [(step, step / 8) for step in range(1, 7)]
    assert scalars_of(directory, "run") == [(s, 0.0) for s in (1, 2, 3)] + [(s, 1.0) for s in (4, 5, 6)]
    written = b"".join(path.read_bytes() for path in directory.iterdir())
    assert b"total_epochs" in written and b"hidden-value" not in written
    assert b"spell cat" in written


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed (verl[wandb])")
def test_wandb_receives_metrics_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with make(tmp_path, ["wandb"]) as tracking:
        tracking.log({"critic/score/mean": 0.5}, 1)
        tracking.log_generations(ROWS, 1)
        tracking.log({"critic/score/mean": 0.75}, 2)
    written = b"".join(path.read_bytes() for path in (tmp_path / "wandb").rglob("*") if path.is_file())
    assert b"critic/score/mean" in written and b"hidden-value" not in written


@pytest.mark.skipif(importlib.util.find_spec("swanlab") is None, reason="swanlab is not installed (verl[swanlab])")
def test_swanlab_receives_metrics_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    with make(tmp_path, ["swanlab"]) as tracking:
        tracking.log({"critic/score/mean": 0.5}, 1)
        tracking.log_generations(ROWS, 1)
    written = b"".join(path.read_bytes() for path in (tmp_path / "swanlog").rglob("*") if path.is_file())
    assert b"critic/score/mean" in written and b"hidden-value" not in written


def test_console_line():
    data = {
        "timing_s/step": 7.91,
        "critic/score/mean": 0.4125,
        "critic/rewards/mean": 0.4125,
        "response_length/clip_ratio": 0.25,
        "actor/grad_norm": float("nan"),
        "val-core/spell/acc/mean@4": 0.5,
        "val-aux/spell/acc/std@4": 0.1,
        "perf/total_num_tokens": 100,
        "perf/time_per_step": 4.0,
        "note": "text",
    }
    assert format_line(data, 3, 20, 130.0) == (
        "step 3/20  score 0.412  clipped 25%  grad_norm nan  step 7.9s  val spell/acc/mean@4 0.500  25 tokens/s"
        "  2m10s left"
    )
    assert format_line({"critic/score/mean": 1, "critic/rewards/mean": 0.5}, 3) == "step 3  score 1.000  reward 0.500"


def test_the_console_keeps_every_metric_in_the_debug_log(caplog):
    stream = io.StringIO()
    with caplog.at_level(logging.DEBUG, logger="verl.utils.tracking.console"):
        ConsoleBackend(stream=stream).log({"a": 1, "b/c": 0.5}, 7)
    assert stream.getvalue() == "step 7\n"
    assert caplog.messages == ["step:7 - a:1 - b/c:0.5"]


def test_long_generations_are_shown_on_one_line(tmp_path, capsys):
    with make(tmp_path, ["console"]) as tracking:
        tracking.log_generations([{"input": "a\nb" * 300, "output": None, "score": None}], 1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and len(lines[0]) < 200 and lines[0].endswith("... -> None")


def test_all_backends_are_closed_if_one_fails(tmp_path):
    tracking = make(tmp_path, ["file", "console"])
    tracking.log({"a": 1}, 1)
    file = tracking._backends["file"]
    tracking._backends["console"].finish = lambda: json.loads("{")
    tracking.finish()
    with pytest.raises(ValueError, match="closed file"):
        file.log({"a": 1}, 2)


class Broken:
    """A backend whose calls raise `error`."""

    def __init__(self, error):
        self.error = error

    def log(self, *arguments):
        raise self.error

    log_generations = finish = log


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("wandb is down"), SystemExit(1)]
)
def test_a_backend_that_fails_is_named_once_and_the_others_go_on(tmp_path, caplog, error):
    tracking = make(tmp_path, ["console", "file"])
    tracking._backends = {"wandb": Broken(error), **tracking._backends}
    for step in (1, 2):
        tracking.log({"a": step}, step)
        tracking.log_generations([{"input": "a", "output": "b", "score": 1.0}], step)
    tracking.finish()
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "'wandb' failed" in warning and str(error) in warning
    assert [record["data"] for record in read_steps(tmp_path / "metrics.jsonl")] == [{"a": 1}, {"a": 2}]


def test_a_full_disk_does_not_end_the_run(tmp_path, caplog):
    tracking = make(tmp_path, ["file", "tensorboard"])
    tracking._backends["file"]._metrics._file.close()
    tracking._backends["file"]._metrics._file = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115
    tracking.log({"a": 1}, 1)
    tracking.finish()
    assert "'file' failed (OSError" in caplog.text and scalars_of(tmp_path / "tensorboard", "a") == [(1, 1.0)]


@pytest.mark.parametrize(
    "error", [ConnectionError("api.example is unreachable"), RuntimeError("no key"), SystemExit(1)]
)
def test_a_backend_that_cannot_be_opened_is_named(tmp_path, monkeypatch, error):
    class Unopened:
        def __init__(self, *arguments):
            raise error

    monkeypatch.setattr(tracker, "WandbBackend", Unopened)
    with pytest.raises(ValueError, match=r"trainer\.logger: 'wandb' cannot be opened .*remove 'wandb'"):
        make(tmp_path, ["file", "wandb"])
