"""The child process: where user code runs, its time limit, and what follows if a call hangs or ends the process."""

import os
import subprocess
import sys

import pytest

from verl.preflight.findings import Findings
from verl.trainer.probes.process import Probes

HEAD = "def compute_score(data_source, solution_str, ground_truth, extra_info):\n    "
LOOPS = "- name: mine\n  _target_: my_loop.py:Mine\n"
LOOP = "from verl.agent_loop import SingleTurnAgentLoop\nclass Mine(SingleTurnAgentLoop):\n    pass\n"


def check(run, step_seconds=60.0, starting=True, found=None):
    found = found or Findings()
    with Probes(run.config(), starting=starting, step_seconds=step_seconds) as probes:
        probes.check(run.config(), found, device="cpu")
    return found


def test_user_code_runs_in_another_process_and_prints_nothing(run, capfd):
    pid = run.root / "pid"
    run.reward(f"import os\nopen({str(pid)!r}, 'a').write(f'{{os.getpid()}} ')\nprint('hello')\n" + HEAD + "return 1")
    found = check(run)
    assert (found.errors, found.warnings, found.notes) == ([], [], [])
    (number,) = pid.read_text().split()
    assert int(number) != os.getpid() and not os.path.exists(f"/proc/{number}")
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_findings_reach_the_parent(run):
    run.reward(HEAD + "return extra_info['level']")
    assert "reads extra_info['level']" in check(run).errors[0]
    run.reward(HEAD + "raise OSError('down')", "other.py")
    found = check(run)
    assert found.errors == [] and "OSError: down" in found.warnings[0]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        pytest.param("while True: pass", "did not finish within 10 s", marks=pytest.mark.slow),
        ("import os; os._exit(3)", "(exit code 3)"),
    ],
)
def test_the_kinds_behind_a_call_that_hangs_or_ends_the_process_are_checked(run, code, words):
    run.reward(HEAD + code)
    run.write("my_loop.py", LOOP.replace("pass", "def __init__(self): pass"))
    run.keys["actor_rollout_ref.rollout.agent.agent_loop_config_path"] = run.write("loops.yaml", LOOPS)
    found = check(run, step_seconds=10.0, starting=False)
    (warning,) = found.warnings
    assert words in warning and "compute_score with " in warning and warning.endswith("was not checked")
    (error,) = found.errors
    assert "agent loop mine" in error


@pytest.mark.slow
def test_exit_handlers_of_the_user_run(run):
    done = run.root / "done"
    run.reward(f"import atexit, pathlib\natexit.register(pathlib.Path({str(done)!r}).touch)\n" + HEAD + "return 1")
    check(run)
    assert done.exists()


@pytest.mark.slow
def test_nothing_is_called_after_errors(run):
    called = run.root / "called"
    run.reward(f"open({str(called)!r}, 'w')\n" + HEAD + "return 1")
    found = check(run, found=Findings(errors=["data.seed=-1"]))
    assert not called.exists() and found.errors == ["data.seed=-1"]
    assert "were not called" in found.notes[0]


@pytest.mark.slow
def test_without_user_code_no_process_starts(run, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", None)
    found = check(run, starting=False)
    assert (found.errors, found.warnings, found.notes) == ([], [], [])


def test_the_parent_imports_no_torch():
    code = "import sys; import verl.trainer.probes.process; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
