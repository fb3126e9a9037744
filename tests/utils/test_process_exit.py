"""A process ends with its status, although threads of others still run; Ctrl-C during imports ends it at once."""

import signal
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


MODULES = (
    "verl.trainer.main_ppo",
    "verl.trainer.main_ppo_sync",
    "verl.experimental.fully_async_policy.fully_async_main",
    "verl.experimental.one_step_off_policy.main_ppo",
)
COMMANDS = [["-m", module] for module in MODULES] + [["-m", "verl.cli", "train"]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_ctrl_c_during_the_imports_ends_a_command_with_one_line(command):
    process = subprocess.Popen(
        [sys.executable, "-v", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with Ctrl-C ignored, and child processes inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        for line in process.stderr:  # `-v` lists the imports
            if line.startswith("import 'hydra"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 130
    assert [line for line in rest.splitlines() if "verl: " in line] == ["verl: stopped by Ctrl-C"]
    assert "Traceback" not in rest


def test_ctrl_c_raises_again_once_a_run_can_be_stopped():
    code = (
        "import os, signal\nfrom verl.utils.process_exit import end_on_interrupt, restore_interrupt\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\nend_on_interrupt()\nrestore_interrupt()\n"
        "try: os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt: print('stopped')"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "stopped\n"


def test_an_ignored_ctrl_c_stays_ignored():
    code = (
        "import os, signal\nfrom verl.utils.process_exit import end_on_interrupt\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\nend_on_interrupt()\nos.kill(os.getpid(), signal.SIGINT)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
