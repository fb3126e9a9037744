"""The campaign notices planted faults of every kind."""

import os
import signal
import sys
import time

import pytest

from campaign.cases import Case, accepts_nothing
from campaign.run import run

CASE = Case("planted", "planted", (), (("the.key",),), outputs=("report",))
SECONDS, PROCESSOR_SECONDS = 600.0, 2


def write_template(root):
    (root / "work").mkdir(parents=True)
    (root / "input").write_text("input")


def says(text, status=2):
    def body(root):
        sys.stderr.write(f"{text}\n")
        return status

    return body


def raises(root):
    raise KeyError("the.key")


def leaves_half_a_file(root):
    (root / "work" / "report").write_text("<html>")
    return says("the.key=7: must be text")(root)


def changes_its_input(root):
    (root / "input").write_text("other")
    return says("the.key=7: must be text")(root)


def hangs(root):
    time.sleep(600)
    return 0


def needs_too_much_memory(root):
    bytearray(64 << 30)
    return 0


def is_killed(root):
    os.kill(os.getpid(), signal.SIGKILL)


def writes_its_output(root):
    (root / "report").write_text("report")
    return 0


def computes(root):
    while True:
        pass


def starts_a_process_and_hangs(root):
    if os.fork() == 0:
        time.sleep(600)
    return hangs(root)


def violations_of(body, case=CASE, seconds=SECONDS):
    results = run(
        [case],
        1,
        limits=(seconds, PROCESSOR_SECONDS),
        write_template=write_template,
        command=lambda _, root: lambda: body(root),
    )
    [(result, _)] = results
    return result.kind, list(result.violations)


def test_an_error_that_names_the_input_is_no_violation():
    assert violations_of(says("the.key=7: must be text")) == ("refused", [])


def test_a_complete_output_is_no_violation():
    assert violations_of(writes_its_output) == ("accepted", [])


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (raises, "traceback: KeyError: 'the.key'"),
        (leaves_half_a_file, "refused, and changed files: work/report"),
        (changes_its_input, "refused, and changed files: input"),
        (needs_too_much_memory, "traceback: MemoryError"),
        (is_killed, "ended by signal 9"),
        (computes, "still computing at its limit of processor time"),
        (says("invalid value"), "the error does not contain 'the.key': invalid value"),
        (says("the.key " * 5000), "an error of 40001 characters"),
        (says("", status=0), "accepted, and did not write report"),
    ],
)
def test_a_planted_fault_is_a_violation(body, expected):
    assert violations_of(body) == ("violation", [expected])


@pytest.mark.slow
@pytest.mark.parametrize("body", [hangs, starts_a_process_and_hangs])
def test_a_hang_is_a_violation(body):
    kind, [violation] = violations_of(body, seconds=2.0)
    assert kind == "violation"
    assert violation.startswith("still running after ")


def test_an_input_that_cannot_work_must_not_be_accepted():
    case = Case("planted", "planted", (), (), why_illegal=accepts_nothing)
    assert violations_of(says("", status=0), case) == ("violation", ["accepted, although it cannot work"])


def test_an_input_that_is_not_bad_must_be_accepted():
    case = Case("planted", "planted", (), (), must_accept=True)
    assert violations_of(says("the.key=7"), case) == (
        "violation",
        ["refused, although its input is not bad: the.key=7"],
    )


def test_each_case_gets_its_own_directory():
    """A case that changes its input has no effect on the next one."""
    seen = []

    def command(case, root):
        seen.append((root / "input").read_text())
        return lambda: changes_its_input(root)

    results = list(run([CASE] * 3, 1, workers=1, write_template=write_template, command=command))
    assert len(results) == 3
    assert seen == ["input"] * 3
