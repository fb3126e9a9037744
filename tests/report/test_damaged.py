"""Reports of damaged and hostile runs: a bad value in any file that a report reads costs no more than itself.

`BAD` are values as they are in the file, so that a test may also write text that is no JSON.
"""

import json
import os
import re

import pytest

from verl.report.page import write_report
from verl.report.run import read_runs
from verl.timeline.reader import read_events

pytestmark = pytest.mark.slow
EVIL = '<script>alert(1)</script>"\\u001b[31m\\u0000\\ud800\\u0085\\r$x_1$'
BAD = {
    "null": "null",
    "text for a number": '"0.5"',
    "empty text": '""',
    "list": "[1, 2]",
    "empty list": "[]",
    "object": '{"a": 1}',
    "empty object": "{}",
    "boolean": "true",
    "negative": "-1",
    "zero": "0",
    "largest double": "1e308",
    "negative double": "-1e308",
    "smallest double": "5e-324",
    "infinity": "Infinity",
    "negative infinity": "-Infinity",
    "not a number": "NaN",
    "integer beyond a double": "9" * 400,
    "integer beyond Python's limit": "-" + "9" * 5000,
    "integer of 19 digits": "9" * 19,
    "deep list": "[" * 2000 + "]" * 2000,
    "deeper object": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "list of mixed kinds": '[null, "a", [1], {"b": 2}, 1e308, true]',
    "object of mixed kinds": '{"q_proj": ["a", null, 1e400], "k_proj": 3, "v_proj": {}, "o_proj": [[], 0.1]}',
    "script and control characters": f'"{EVIL.replace(chr(34), "")}"',
    "long text": '"' + "x" * 20_000 + '"',
    "date out of range": '"2026-13-45"',
    "cut off": '{"a": ',
}
YAML_ONLY = {
    "date": "2026-13-45",
    "alias of itself": "&me [*me]",
    "mapping in itself": "&me {a: *me}",
    "growing aliases": "[&a [x, x], &b [*a, *a], &c [*b, *b]]",
    "hexadecimal": "0x" + "f" * 9000,
    "tag": "!!python/object/apply:os.system [true]",
    "odd tag": "!!bool maybe",
    "binary": "!!binary ///",
    "set": "!!set {a, b}",
    "infinity": ".inf",
    "not a number": ".nan",
    "key of another kind": "{1: a, null: b, 2026-01-01: c, [1, 2]: d}",
    "flow of brackets": "[" * 3000,
}
CONFIG = """
data: {max_response_length: 64}
actor_rollout_ref: {model: {path: /m}, rollout: {quantization: ascend}}
trainer: {project_name: p, experiment_name: e, default_local_dir: /r, total_training_steps: 3, logger: [file],
  validation_data_dir: /r/validation, rollout_data_dir: null, timeline: /r/timeline.json}
"""
SCRIPT = re.compile(r"<script|[\x00-\x08\x0b-\x1f\x7f-\x9f]|[\ud800-\udfff]")


def report(directory):
    """Return the page, which must be whole and harmless."""
    page = write_report([directory], directory / "report.html").read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>")
    assert SCRIPT.search(page) is None
    return page


def small_run(make_run, name, keep_timeline=False):
    """Write a run of which a report needs one figure, and perhaps that of the timeline."""
    directory = make_run(name, steps=2)
    lines = [{"step": step, "data": {"response_length/mean": 3.0}} for step in (1, 2)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if not keep_timeline:
        (directory / "timeline.json").unlink()
    return directory


def with_value(field, text):
    return json.dumps(field).replace('"BAD"', text)


def test_each_bad_value_of_a_metric_is_a_gap(make_run):
    """All values in one file, one in each step: the other steps stay."""
    directory = make_run("metrics", steps=len(BAD) + 2)
    texts = list(BAD.values())
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines()
    for number, text in enumerate(texts):
        record = json.loads(lines[number + 1])
        record["data"] = dict.fromkeys(record["data"], "BAD")
        lines[number + 1] = with_value(record, text)
    path.write_text("\n".join(lines) + "\n")
    page = report(directory)
    assert "<h3>Reward in training</h3>" in page
    [run] = read_runs([directory])
    good = {1, len(BAD) + 2}
    finite = {"negative", "zero", "smallest double", "integer of 19 digits"}
    good |= {2 + number for number, name in enumerate(BAD) if name in finite}
    steps, values = run.curve("critic/score/mean")
    assert {step for step, value in zip(steps, values, strict=True) if value == value} == good
    damaged = {"deep list", "deeper object", "cut off"}
    assert any(note.startswith(f"{len(damaged)} lines are damaged in metrics.jsonl") for note in run.notes)
    assert any("critic/score/mean is not a finite number in step 2" in note for note in run.notes)


def test_each_bad_value_in_a_dump_of_samples_costs_its_row(make_run):
    """Every field of a row has the value, except the score of half of the rows."""
    directory = make_run("samples", steps=3)
    for kind in ("validation", "rollouts"):
        rows = [{"input": "p", "output": "good", "gts": "42", "score": 1e20, "step": 3}]
        lines = [json.dumps(rows[0])]
        for name, text in BAD.items():
            high = 2e20 if name.startswith("script") else 0.7
            fields = dict.fromkeys(("input", "output", "gts", "uid", "extra", "acc"), "BAD")
            lines += [with_value({**fields, "step": 3, "score": score}, text) for score in (high, "BAD")]
            lines.append(with_value("BAD", text))
            lines.append(with_value({"step": "BAD", "score": 1.0, "output": "no step"}, text))
        (directory / kind / "3.jsonl").write_text("\n".join(lines) + "\n")
    page = report(directory)
    assert page.count("<pre>good</pre>") >= 1
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize("field", ["name", "ph", "pid", "ts", "dur", "args", "cat", "id"])
def test_each_bad_value_in_a_timeline_costs_its_event(make_run, field):
    directory = small_run(make_run, "timeline", keep_timeline=True)
    path = directory / "timeline.json"
    lines = path.read_text().splitlines()
    for line in list(lines[1:]):
        event = json.loads(line.rstrip(","))
        if field in event:
            lines += [with_value({**event, field: "BAD"}, text) + "," for text in BAD.values()]
            if event["name"] == "step":
                lines += [with_value({**event, "args": {"step": "BAD"}}, text) + "," for text in BAD.values()]
            if event["name"] == "process_name":
                lines += [with_value({**event, "args": {"name": "BAD"}}, text) + "," for text in BAD.values()]
    path.write_text("\n".join(lines) + "\n")
    assert "Timeline of a step: step " in report(directory)
    assert len(read_events(path)) >= 15


@pytest.mark.parametrize("name", [*BAD, *(f"yaml: {name}" for name in YAML_ONLY)])
def test_each_bad_value_in_the_config_costs_its_key_or_the_file(make_run, name):
    text = YAML_ONLY[name.removeprefix("yaml: ")] if name.startswith("yaml: ") else BAD[name]
    directory = small_run(make_run, "config")
    keys = re.findall(r"(\w+): (?!\{)", CONFIG)
    config = CONFIG
    for key in keys:
        config = re.sub(rf"\b{key}: (\[.*?\]|[^,}}]+)", lambda match, key=key: f"{key}: BAD_VALUE", config)
    (directory / "config.yaml").write_text(config.replace("BAD_VALUE", text))
    changes = {"a.b": {"value": "BAD", "default": "BAD"}, "c": "BAD"}
    (directory / "config_changes.yaml").write_text(with_value(changes, text))
    assert "Length of a response</h3>" in report(directory)
    # One key alone.
    (directory / "config.yaml").write_text(CONFIG.replace("/r,", f"{text},"))
    report(directory)
    # The whole file.
    (directory / "config.yaml").write_text(text)
    report(directory)


FILES = (
    "metrics.jsonl",
    "config.yaml",
    "config_changes.yaml",
    "validation/2.jsonl",
    "rollouts/2.jsonl",
    "timeline.json",
)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-9])


def invalid_utf8(path):
    path.write_bytes(path.read_bytes().replace(b"a", b"\xff\xfe"))


def directory_instead(path):
    path.unlink()
    path.mkdir()


def pipe_instead(path):
    path.unlink()
    os.mkfifo(path)


def link_to_itself(path):
    path.unlink()
    path.symlink_to(path.name)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "line breaks": lambda path: path.write_bytes(b"\n\r\n\n"),
    "byte order mark": lambda path: path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes()),
    "utf-16": lambda path: path.write_bytes(path.read_text().encode("utf-16")),
    "truncated": truncated,
    "invalid utf-8": invalid_utf8,
    "directory": directory_instead,
    "pipe": pipe_instead,
    "link to itself": link_to_itself,
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_report_without_one_of_its_files(make_run, file, damage):
    directory = small_run(make_run, "run", keep_timeline=file == "timeline.json")
    DAMAGE[damage](directory / file)
    page = report(directory)
    kind, _, _ = file.partition(".")
    if damage in ("missing", "directory", "pipe", "link to itself") and "/" not in file:
        assert f"No {file}" in page or f"No {kind}" in page or f"{file} cannot be read" in page
    assert ("Length of a response</h3>" in page) or file == "metrics.jsonl"


@pytest.mark.parametrize("name", ["a\x1b[31m<script>b", "w\udce9", "$x_1^{", "a" * 200])
def test_a_directory_with_an_odd_name(make_run, tmp_path, name):
    runs = [small_run(make_run, name), small_run(make_run, "other")]
    page = write_report(runs, tmp_path / "both.html").read_text(encoding="utf-8")
    assert SCRIPT.search(page) is None


def test_names_of_metrics_layers_and_processes_are_escaped(make_run):
    directory = make_run("names", steps=2)
    evil = json.loads(f'"{EVIL.replace(chr(34), "")}"').replace("/", "|")
    lines = []
    for step in (1, 2):
        data = {
            f"val-core/{evil}/{evil}/mean@4": 0.5,
            f"val-core/{evil}/mean@1": 0.5,
            "val-core/mean@1": 0.5,
            "val-core/": 0.5,
            evil: None,
            "weight_update/max_quantization_error": 0.1,
            "weight_update/max_quantization_error_layer": evil,
            "weight_update/quantization_errors": {evil: [0.1, 0.2]},
        }
        lines.append(json.dumps({"step": step, "data": data}))
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    timeline = (directory / "timeline.json").read_text()
    for name in ("driver", "replica 0", "gen", "update_actor"):
        timeline = timeline.replace(f'"{name}"', json.dumps(f"{name} {evil}"))
    (directory / "timeline.json").write_text(timeline)
    page = report(directory)
    assert page.count("&lt;script&gt;") > 5
