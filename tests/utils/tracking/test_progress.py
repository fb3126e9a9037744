"""Progress on a terminal and without one."""

import io
import os
import pty
import subprocess
import sys
import textwrap

import pytest

from verl.utils.tracking.progress import Progress, TimeLeft, duration, reward_of, tokens_per_second

METRICS = {"critic/score/mean": 0.4567, "perf/total_num_tokens": 1000, "perf/time_per_step": 4.0}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0s"), (59, "59s"), (59.9, "1m00s"), (185, "3m05s"), (7620, "2h07m"), (273600, "3d04h"), (-1, "0s")],
)
def test_duration_as_text(seconds, text):
    assert duration(seconds) == text


def test_time_left_follows_the_last_steps():
    now = [100.0]
    left = TimeLeft(total_steps=40, start_step=10, clock=lambda: now[0])
    assert left.update(10) is None
    for step in range(11, 16):
        now[0] += 2.0
        assert left.update(step) == pytest.approx((40 - step) * 2.0)
    for step in range(16, 31):
        now[0] += 1.0
        left.update(step)
    assert left.update(30) == pytest.approx(10.0)  # the slow steps have left the window
    now[0] += 1.0
    assert left.update(40) == 0.0


def test_one_time_work_does_not_count_for_the_time_left():
    now = [0.0]
    left = TimeLeft(total_steps=10, clock=lambda: now[0])
    now[0] += 100.0
    assert left.update(0) is None  # a validation before the first step
    now[0] += 9.0
    assert left.update(1) == pytest.approx(81.0)
    now[0] += 1.0
    assert left.update(2) == pytest.approx(8.0)
    now[0] += 3.0
    assert left.update(3) == pytest.approx(14.0)


def test_reward_and_speed_of_the_metrics():
    assert reward_of(METRICS) == 0.4567 and reward_of({}) is None
    assert reward_of({"critic/rewards/mean": 1}) == 1.0
    assert tokens_per_second(METRICS) == 250.0
    assert tokens_per_second({"perf/total_num_tokens": 5, "perf/time_per_step": 0.0}) is None


def test_plain_lines_are_written_without_a_terminal():
    stream = io.StringIO()
    with Progress(3, start_step=1, stream=stream) as progress:
        progress.update(1, {})
        progress.update(2, METRICS)
        progress.update(3, METRICS)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 1/3"
    assert lines[1].startswith("step 2/3  reward 0.457  250 tokens/s  ") and lines[1].endswith(" left")
    assert lines[2].endswith("0s left")
    assert "\x1b" not in stream.getvalue()


def test_plain_lines_can_be_turned_off():
    stream = io.StringIO()
    with Progress(3, lines=False, stream=stream) as progress:
        progress.update(1, METRICS)
    assert stream.getvalue() == ""


ON_TERMINAL = """
    import sys, time
    from verl.utils.tracking.progress import Progress
    with Progress(4) as progress:
        for step in range(1, 5):
            print("line of step", step)
            progress.update(step, {"critic/score/mean": 0.5, "perf/total_num_tokens": 80, "perf/time_per_step": 1.0})
            time.sleep(0.15)
"""


def test_a_terminal_shows_a_bar():
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(ON_TERMINAL)], stdout=child, stderr=child, env=environment
    )
    os.close(child)
    output = b""
    try:
        while chunk := os.read(parent, 4096):
            output += chunk
    except OSError:  # EIO: the other side is closed
        pass
    finally:
        os.close(parent)
        assert process.wait(timeout=30) == 0
    text = output.decode()
    assert "4/4" in text and "reward 0.500" in text and "80 tokens/s" in text and "left" in text
    assert all(f"line of step {step}" in text for step in range(1, 5))
    assert "\x1b[?25h" in text, "the cursor is shown again"
