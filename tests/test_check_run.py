"""Comparison of runs with stored bounds, on logs of real runs that contain only the compared metrics."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
RUNS = Path(__file__).with_name("runs")
BOUNDS = yaml.safe_load((ROOT / ".github/bounds.yaml").read_text())
ON_A_CPU = sorted(path.stem for path in RUNS.glob("*.jsonl"))


@pytest.fixture(scope="module")
def check_run():
    spec = importlib.util.spec_from_file_location("check_run", ROOT / ".github/check_run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def records(name):
    return [json.loads(line) for line in (RUNS / f"{name}.jsonl").read_text().splitlines()]


def write(directory, lines):
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(directory)


def test_every_section_for_a_cpu_has_a_run():
    assert sorted(name for name in BOUNDS if not name.endswith("-npu")) == ON_A_CPU
    assert sorted(name for name in BOUNDS if name.endswith("-npu")) == ["grpo-ascend-npu", "ppo-ascend-npu"]


@pytest.mark.parametrize("name", ON_A_CPU)
def test_a_real_run_is_within_its_bounds(check_run, name, tmp_path, capsys):
    assert check_run.main([write(tmp_path, records(name)), name]) == 0
    output = capsys.readouterr().out
    assert output.startswith("ok    steps: 20, expected 20\n") and "FAIL" not in output
    assert len(output.splitlines()) == 1 + sum(len(wanted) for wanted in BOUNDS[name]["metrics"].values())


def without(name, metric):
    return [{**line, "data": {k: v for k, v in line["data"].items() if k != metric}} for line in records(name)]


def with_value(name, metric, value, steps=range(21)):
    return [
        {**line, "data": {**line["data"], metric: value}} if metric in line["data"] and line["step"] in steps else line
        for line in records(name)
    ]


@pytest.mark.parametrize("name", ON_A_CPU)
def test_a_run_without_progress_or_without_a_metric_or_with_fewer_steps_fails(check_run, name, tmp_path, capsys):
    reward = "val-aux/reasoning_gym/spell_backward/reward/mean@4"
    broken = {
        f"FAIL  {reward}: rise 0, ": with_value(name, reward, 0.5),
        f"FAIL  {reward}: was not logged": without(name, reward),
        "FAIL  actor/grad_norm: max nan, ": with_value(name, "actor/grad_norm", float("nan"), steps=[7]),
        "FAIL  steps: 19, expected 20": records(name)[:-1],
        "FAIL  steps: 0, expected 20": [],
    }
    for expected, lines in broken.items():
        assert check_run.main([write(tmp_path, lines), name]) == 1
        assert expected in capsys.readouterr().out


@pytest.mark.parametrize(("quantized", "unquantized"), [("grpo-ascend", "grpo-null"), ("ppo-ascend", "ppo-null")])
def test_quantized_and_unquantized_runs_fail_each_others_bounds(check_run, quantized, unquantized, tmp_path):
    assert check_run.main([write(tmp_path, records(unquantized)), quantized]) == 1
    assert check_run.main([write(tmp_path, records(quantized)), unquantized]) == 1


def test_statistics(check_run):
    lines = [{"step": step, "data": {"a": value}} for step, value in enumerate([3.0, 1.0, 8.0, 5.0])]
    expected = {"first": 3.0, "last": 5.0, "rise": 2.0, "median": 4.0, "min": 1.0, "max": 8.0}
    for statistic, value in expected.items():
        for bound, holds in (
            ({"min": value, "max": value}, True),
            ({"min": value + 0.1}, False),
            ({"max": value - 0.1}, False),
        ):
            section = {"steps": 3, "metrics": {"a": {statistic: bound}}}
            assert [held for _, held in check_run.compare(lines, section)] == [True, holds]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"steps": 1}, "has the keys"),
        ({"steps": 1, "metrics": {"a": {"mean": {"min": 0}}}}, "a: mean: .* use one of first, last"),
        ({"steps": 1, "metrics": {"a": {"last": {"least": 0}}}}, "a: last: .* with min or max"),
        ({"steps": 1, "metrics": {"a": {"last": {}}}}, "a: last: "),
    ],
)
def test_invalid_bounds_are_an_error(check_run, section, message, tmp_path, capsys):
    path = tmp_path / "bounds.yaml"
    path.write_text(yaml.safe_dump({"mine": section}))
    with pytest.raises(ValueError, match=message):
        check_run.load_bounds(path, "mine")
    assert check_run.main([str(tmp_path), "mine", "--bounds", str(path)]) == 2
    assert check_run.main([str(tmp_path), "other", "--bounds", str(path)]) == 2
    assert "has no section other; it has mine" in capsys.readouterr().err
