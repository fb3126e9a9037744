"""A process ends with its status, although threads of others still run."""

import subprocess
import sys

import pytest

START = "import atexit, sys, threading, time; from concurrent.futures import ThreadPoolExecutor\n"
HELD = {
    "thread": "threading.Thread(target=time.sleep, args=(600,), name='their-thread').start()",
    "pool": "ThreadPoolExecutor(1, thread_name_prefix='their-thread').submit(time.sleep, 600)",
    "exit-handler": "atexit.register(time.sleep, 600)",
}


@pytest.mark.parametrize("kind", HELD)
def test_the_process_ends_with_its_status(kind):
    code = f"{START}from verl.utils.process_exit import limit_exit\n{HELD[kind]}\nlimit_exit(3, 0.1)\nsys.exit(3)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 3
    assert ("exit handlers that did not return" if kind == "exit-handler" else "their-thread") in done.stderr


def test_exit_handlers_run_and_a_free_process_ends_at_once():
    code = (
        f"{START}from verl.utils.process_exit import limit_exit\natexit.register(print, 'handled')\n"
        "limit_exit(3, 600)\nsys.exit(3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (3, "handled\n", "")
