"""Commands and endings of child processes."""

import subprocess
import sys
import time

import psutil
import pytest

from verl.utils.child_process import ending, interpreter_command, start_child

DAEMON = """
import os, subprocess, sys, time

def main(parent):
    if os.fork() == 0:  # a daemon: a session of its own, and a parent that ends
        os.setsid()
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open({path!r}, "w").write(str(process.pid))
        os._exit(0)
    time.sleep({seconds})
"""


def test_a_new_interpreter_has_the_same_path_and_gets_the_numbers(tmp_path, monkeypatch):
    (tmp_path / "own_child.py").write_text("import sys\ndef main(a, b):\n    sys.exit(a + b)\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert subprocess.run(interpreter_command("own_child", 2, 3), check=False).returncode == 5


def test_an_ending_is_a_signal_or_an_exit_code():
    assert (ending(-9), ending(3)) == ("signal SIGKILL", "exit code 3")


@pytest.mark.parametrize("seconds", [0, 600], ids=["it has ended", "it runs"])
def test_processes_that_left_the_session_are_killed_too(tmp_path, monkeypatch, seconds):
    pid_file = tmp_path / "pid"
    (tmp_path / "daemon_child.py").write_text(DAEMON.format(path=str(pid_file), seconds=seconds))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    child = start_child("daemon_child", fds=[])
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        while not (pid_file.exists() and pid_file.read_text()):
            time.sleep(0.05)
        if not seconds:
            child.wait()
        daemon = psutil.Process(int(pid_file.read_text()))
        child.kill_family()
        child.wait()
        daemon.wait(20)  # raises TimeoutExpired if it lives on
        assert other.poll() is None, "a process of somebody else"
    finally:
        other.kill()
        other.wait()
