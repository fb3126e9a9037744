"""The JSONL file through kills, resumes and full disks."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from verl.utils.tracking.jsonl import FileBackend, StepFile, read_steps


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_each_step_is_one_flushed_line(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    backend = FileBackend(path)
    for step in range(3):
        backend.log({"a": step / 4, "nan": float("nan")}, step)
        # The open file already contains every logged line.
        lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
        assert lines == [{"step": s, "data": {"a": s / 4, "nan": None}} for s in range(step + 1)]
    backend.finish()
    backend.finish()


def test_a_repeated_step_is_merged_into_its_line(tmp_path):
    backend = FileBackend(tmp_path / "m.jsonl")
    backend.log({"val": 1}, 0)
    backend.log({"loss": 0.5, "long": "x" * 200}, 1)
    backend.log({"loss": 0.25, "timing_s/save": 2, "long": ""}, 1)
    backend.log({"loss": 0.1}, 2)
    assert read_steps(tmp_path / "m.jsonl") == [
        {"step": 0, "data": {"val": 1}},
        {"step": 1, "data": {"loss": 0.25, "long": "", "timing_s/save": 2}},
        {"step": 2, "data": {"loss": 0.1}},
    ]
    assert steps_in(tmp_path / "m.jsonl") == [0, 1, 2], "nothing is left of the longer line"
    with pytest.raises(ValueError, match=r"step=1: .* already holds step 2"):
        backend.log({}, 1)


def test_resume_drops_later_steps_and_continues(tmp_path):
    path = tmp_path / "m.jsonl"
    first = FileBackend(path)
    for step in range(6):
        first.log({"run": 1}, step)
        first.log_generations([{"input": "a", "output": "b", "score": step}], step)
    first.finish()
    second = FileBackend(path, resume_step=3)
    assert steps_in(path) == [0, 1, 2, 3]
    assert steps_in(tmp_path / "generations.jsonl") == [0, 1, 2, 3]
    dropped = [record["data"] for record in read_steps(tmp_path / "m.jsonl.dropped")]
    assert dropped == [{"run": 1}] * 2 and steps_in(tmp_path / "generations.jsonl.dropped") == [4, 5]
    second.log({"val": 1}, 3)
    for step in range(4, 7):
        second.log({"run": 2}, step)
    assert steps_in(path) == list(range(7))
    data = {record["step"]: record["data"] for record in read_steps(path)}
    assert data[3] == {"run": 1, "val": 1} and data[4] == {"run": 2}


TAILS = [b'{"step": 3, "da', b'{"step": 3}\n\xff\xfe', b"\x00" * 40, b"[1]\n", b'{"step": "3"}\n']


@pytest.mark.parametrize("tail", TAILS)
def test_a_damaged_end_is_repaired(tmp_path, caplog, tail):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1, "data": {}}\n{"step": 2, "data": {}}\n' + tail)
    backend = FileBackend(path, resume_step=2)
    assert steps_in(path) == [1, 2]
    assert "line 3" in caplog.text or b'"step": 3}' in tail
    backend.log({}, 3)
    assert steps_in(path) == [1, 2, 3]


def test_a_last_line_without_newline_is_kept(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step":1,"data":{"b":2,"a":1}}')
    backend = FileBackend(path, resume_step=1)
    backend.log({"c": 3}, 1)
    backend.log({}, 2)
    assert [r["data"] for r in read_steps(path)] == [{"b": 2, "a": 1, "c": 3}, {}]


def test_a_fresh_run_renames_an_existing_file(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1, "data": {}}\n')
    FileBackend(path).log({}, 0)
    assert steps_in(path) == [0]
    assert steps_in(tmp_path / "m.jsonl.previous") == [1]


WRITER = """
    import sys
    from verl.utils.tracking.jsonl import StepFile
    path, resume = sys.argv[1], int(sys.argv[2])
    file = StepFile(path, resume_step=resume)
    print("ready", flush=True)
    step = resume
    while True:
        step += 1
        file.write({"step": step, "data": {"x": step * 0.5, "pad": "y" * (step % 97)}})
        file.write({"step": step, "data": {"later": 1}})
"""


def test_each_step_appears_once_after_sigkill_and_resume(tmp_path):
    path, rng, resume = tmp_path / "m.jsonl", random.Random(0), 0
    for _ in range(4):
        command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path), str(resume)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        try:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0.005, 0.05))
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        records = read_steps(path)
        assert [r["step"] for r in records] == list(range(1, len(records) + 1))
        assert all(r["data"]["x"] == r["step"] * 0.5 for r in records)
        resume = max(0, len(records) - rng.randrange(5))
    assert resume > 10


FULL = """
    import resource, sys
    from verl.utils.tracking.jsonl import StepFile
    file = StepFile(sys.argv[1], resume_step=None)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
    try:
        for step in range(100):
            file.write({"step": step, "data": {"x": "y" * 40}})
    except OSError as error:
        print(error.errno, error)
"""


def test_a_full_disk_error_names_file_and_step_and_keeps_earlier_lines(tmp_path):
    path = tmp_path / "m.jsonl"
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(FULL), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    number, text = done.stdout.split(" ", 1)
    assert int(number) == 27 and str(path) in text and "the record of step 4 is not written" in text
    assert signal.SIGXFSZ and os.path.getsize(path) <= 300
    reopened = StepFile(path, resume_step=99)
    assert steps_in(path) == [0, 1, 2, 3]
    reopened.write({"step": 4, "data": {}})
    assert steps_in(path) == [0, 1, 2, 3, 4]


def test_a_missing_file_has_no_steps(tmp_path):
    assert read_steps(tmp_path / "none.jsonl") == []
