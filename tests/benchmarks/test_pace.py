import sys
from pathlib import Path

import pace
import pytest

BENCHMARKS = str(Path(pace.__file__).parent)
COUNTS = """
from pace import Gate
gate = Gate()
try:
    for tokens in range(100):
        gate.arrive(tokens)
        print("let through", tokens, flush=True)
except EOFError:
    print("over", flush=True)
"""


def start(code: str, tmp_path: Path) -> pace.PacedProcess:
    return pace.PacedProcess([sys.executable, "-c", code], {"PYTHONPATH": BENCHMARKS}, tmp_path, tmp_path / "log")


def test_a_paced_process_steps_only_on_command(tmp_path):
    process = start(COUNTS, tmp_path)
    try:
        assert process.wait_for_arrival() == 0
        seconds, tokens = process.step()
        assert tokens == 1
        assert seconds > 0
        assert process.step()[1] == 2
        # It waits at the gate after two steps and has not begun a third.
        assert (tmp_path / "log").read_text().splitlines() == ["let through 0", "let through 1"]
    finally:
        process.close()
    assert process.process.returncode is not None


def test_a_process_that_ends_is_an_error_with_its_output(tmp_path):
    process = start("raise SystemExit('no model here')", tmp_path)
    try:
        with pytest.raises(RuntimeError, match=r"(?s)status 1.*no model here"):
            process.wait_for_arrival()
    finally:
        process.close()
