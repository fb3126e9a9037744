"""The lock of a run's directory, held by real processes."""

import os
import socket
import subprocess
import sys

import pytest

from verl.utils.run_lock import LOCK_FILE, RunLockedError, lock_holder, run_lock

HOLDER = """
import sys
from verl.utils.run_lock import run_lock
with run_lock(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_run(tmp_path):
    """A process that holds the lock until its standard input is closed."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"locked\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_a_second_run_is_refused_and_names_the_first(tmp_path, other_run):
    named = f"process {other_run.pid} on {socket.gethostname()}"
    assert named in lock_holder(tmp_path)
    with (
        pytest.raises(RunLockedError, match=rf"default_local_dir=.*{named}.*choose another directory"),
        run_lock(tmp_path),
    ):
        pass
    assert named in lock_holder(tmp_path), "the failed attempt keeps the name"


@pytest.mark.parametrize("end", ["kill", "finish"])
def test_the_lock_ends_with_its_process(tmp_path, other_run, end):
    other_run.kill() if end == "kill" else other_run.stdin.close()
    other_run.wait()
    assert lock_holder(tmp_path) is None
    with run_lock(tmp_path):
        assert f"process {os.getpid()} on" in lock_holder(tmp_path)
    assert lock_holder(tmp_path) is None


def test_a_child_process_does_not_keep_the_lock(tmp_path):
    with run_lock(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    try:
        with run_lock(tmp_path):
            pass
    finally:
        child.communicate()


def test_the_directory_is_created(tmp_path):
    assert lock_holder(tmp_path / "new") is None
    with run_lock(tmp_path / "new" / "run"):
        assert (tmp_path / "new" / "run" / LOCK_FILE).exists()
