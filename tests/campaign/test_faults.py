"""The fault campaign: faults strike once and where they are to, and every broken invariant is found."""

import errno
import json
import os
import random
import signal
import subprocess
import sys

import pytest

import campaign.faults
from campaign import jsonl
from campaign.faults import results
from campaign.faults.catalog import catalog
from campaign.faults.inject.sitecustomize import PLACES
from campaign.faults.run import INJECT, FaultedRun, Settings
from campaign.faults.schedule import schedule

STATE = "from verl.trainer.ppo.checkpoint import save_driver_state\n"


def python(tmp_path, code, **orders):
    """Run code in a Python process with orders; `a__b={...}` is the order for the place a.b."""
    for place, action in orders.items():
        (tmp_path / f"{place.replace('__', '.')}.armed").write_text(json.dumps(action))
    paths = os.pathsep.join([str(INJECT), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths, "VERL_CAMPAIGN_FOLDER": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.slow
def test_an_order_is_carried_out_once_by_the_function_of_its_place(tmp_path):
    code = STATE + (
        "for _ in range(2):\n"
        "    try:\n"
        f"        save_driver_state({str(tmp_path)!r}, {{}})\n"
        "    except OSError as error:\n"
        "        print(error.errno, error.filename)\n"
    )
    ended = python(tmp_path, code, driver__state={"kind": "errno", "value": errno.ENOSPC})
    assert ended.stdout == f"{errno.ENOSPC} struck at driver.state\n", ended.stderr
    assert (tmp_path / "driver.state.struck").exists() and not (tmp_path / "driver.state.armed").exists()


@pytest.mark.slow
def test_a_signal_strikes_the_process_itself(tmp_path):
    code = STATE + f"save_driver_state({str(tmp_path)!r}, {{}})"
    ended = python(tmp_path, code, driver__state={"kind": "signal", "value": signal.SIGKILL})
    assert ended.returncode == -signal.SIGKILL
    assert (tmp_path / "driver.state.pid").read_text().isdecimal()


@pytest.mark.slow
def test_every_place_exists(tmp_path):
    """A function that was renamed would leave its place without a fault: the import fails instead."""
    modules = ", ".join(PLACES)
    ended = python(tmp_path, f"import {modules}")
    assert ended.returncode == 0, ended.stderr[-2000:]


def test_every_fault_at_a_place_names_one_that_exists():
    places = {place for functions in PLACES.values() for place in functions.values()}
    faults = [fault for part in catalog(15.0) for fault in part]
    assert {fault.target for fault in faults if fault.inside} == places
    assert len(set(map(str, faults))) > 100


def test_the_schedule_depends_on_the_seed_only():
    assert schedule(random.Random("1/7")) == schedule(random.Random("1/7")) != schedule(random.Random("1/8"))


@pytest.fixture
def faulted(tmp_path):
    """A finished run of three steps, made up of its records."""
    run = FaultedRun(tmp_path, Settings(1, 1, 0, "off", None), random.Random(0))
    run.run.out.mkdir()
    run.dumps.mkdir()
    for step, prompts in run.run.expected_prompts(3).items():
        samples = [{"input": prompt, "output": "ab", "gts": "abc", "score": 0.25} for prompt in prompts]
        write_lines(run.dumps / f"{step}.jsonl", samples)
    write_metrics(run, [1, 2, 3])
    return run


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_metrics(run, steps, **changes):
    data = {
        "training/versions_behind/min": 0.0,
        "training/versions_behind/max": 0.0,
        "training/rollout_probs_diff_max": 1e-6,
        **{name.replace("__", "/"): value for name, value in changes.items()},
    }
    write_lines(run.run.out / "metrics.jsonl", [{"step": step, "data": data} for step in steps])


def test_an_undisturbed_run_violates_nothing(faulted):
    assert faulted.differences(3) == []


def test_broken_invariants_are_found(faulted):
    def found(pattern):
        (problem,) = faulted.differences(3)
        assert pattern in problem

    for steps in ([1, 3], [1, 2, 2, 3], [1, 2]):
        write_metrics(faulted, steps)
        found("steps in the log")
    for change, words in (
        ({"training__versions_behind/max": 1.0}, "versions behind"),
        ({"training__rollout_probs_diff_max": 1e-3}, "differ by 0.001"),
        ({"training__rollout_probs_diff_max": float("nan")}, "differ by nan"),
    ):
        write_metrics(faulted, [1, 2, 3], **change)
        assert words in faulted.differences(3)[0]
    write_metrics(faulted, [1, 2, 3])
    dump = faulted.dumps / "2.jsonl"
    samples = [json.loads(line) for line in dump.read_text().splitlines()]
    write_lines(dump, [samples[0] | {"score": 0.0}, *samples[1:]])
    found("2.jsonl, sample 0: score 0.0")
    write_lines(dump, samples[::-1])
    found("prompts")
    write_lines(dump, samples)
    (faulted.run.out / "global_step_3.tmp-77").mkdir()
    found("temporary files")


def test_results_are_read_counted_and_written(tmp_path):
    fault = {"fault": "SIGKILL to the rank", "target": "rank", "step": 4, "seconds": 1.0, "violations": []}
    faults = [
        fault | {"outcome": "ended"},
        fault | {"outcome": "not reached"},
        fault | {"target": "engine", "outcome": "survived", "violations": ["wrong"]},
    ]
    record = {"run": 0, "settings": {}, "seconds": 3600, "faults": faults, "violations": [], "directory": None}
    file = tmp_path / "build" / "results.jsonl"
    assert jsonl.read(file) == []
    jsonl.append(file, record)
    records = jsonl.read(file)
    assert records == [record]
    assert results.counts(records) == [("engine", 1, 1, 0, 1), ("rank", 1, 0, 1, 0)]
    assert results.count(records) == 2 and results.violated(records)
    document = tmp_path / "page.md"
    document.write_text("<!-- faults -->\n<!-- /faults -->\n")
    results.write(document, records, seed=1)
    assert "| engine | 1 " in document.read_text() and "2 faults in 1 runs, 1.0 hours" in document.read_text()


def test_the_modules_of_the_package_are_listed():
    folder = INJECT.parent
    for module in folder.glob("*.py"):
        assert module.stem.startswith("__") or module.name in campaign.faults.__doc__
