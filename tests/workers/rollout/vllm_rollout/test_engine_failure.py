"""The text of an engine's failure, in a process whose outputs are files, as Ray's actors have them."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from verl.workers.rollout.vllm_rollout.engine_failure import failure_text
print("(EngineCore pid=7) ERROR 11-29 21:28:51 [core.py:1510]     raise ValueError('no entry')", file=sys.stderr)
print({line!r}, file=sys.stderr, flush=True)
print("(MainProcess pid=3) ERROR 11-29 21:28:52 [async_llm.py:906] EngineDeadError: see above", flush=True)
open({result!r}, "w").write(failure_text(RuntimeError({error!r})))
"""
PREFIX = "(EngineCore pid=7) ERROR 11-29 21:28:51 [core.py:1510] "


def text_with(tmp_path, line, error="see above"):
    program = PROGRAM.format(line=line, error=error, result=str(tmp_path / "result"))
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        subprocess.run([sys.executable, "-c", program], stdout=out, stderr=err, check=True)
    return (tmp_path / "result").read_text()


@pytest.mark.parametrize(
    "cause", ["ValueError: the description has no entry 'a.weight'", "torch.OutOfMemoryError: no memory"]
)
def test_the_cause_stands_before_the_error(tmp_path, cause):
    assert text_with(tmp_path, PREFIX + cause) == f"{cause} (see above)"


def test_the_error_alone_is_the_text_without_a_traceback(tmp_path):
    assert text_with(tmp_path, "") == "see above"


def test_outputs_that_are_no_files_are_not_read():
    program = (
        "from verl.workers.rollout.vllm_rollout.engine_failure import failure_text\n"
        f"print({PREFIX + 'ValueError: x'!r}, flush=True)\n"
        "print(failure_text(RuntimeError('see above')))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "see above"


@pytest.mark.parametrize(
    ("error", "rest"),
    [
        (
            "EngineCore encountered an issue. See stack trace (above) for the root cause.",
            "EngineCore encountered an issue.",
        ),
        (
            "initialization failed. See root cause above. Failed processes: {0: -9}",
            "initialization failed. Failed processes: {0: -9}",
        ),
    ],
)
def test_no_text_points_to_a_log_that_its_reader_does_not_see(tmp_path, error, rest):
    assert text_with(tmp_path, PREFIX + "ValueError: no entry", error) == f"ValueError: no entry ({rest})"
    assert text_with(tmp_path, "", error).startswith(f"{rest} Its processes logged no error")
