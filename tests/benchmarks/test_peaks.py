import os
import subprocess
import sys

import peaks
import pytest


@pytest.mark.parametrize(
    ("command_line", "role"),
    [
        ("ray::TrainWorker.call", "trainer rank"),
        ("ray::vLLMHttpServer.start", "replica"),
        ("VLLM::EngineCore", "engine process"),
        ("/env/bin/python -m verl.trainer.main_ppo key=value", "driver"),
        ("/env/ray/core/src/ray/raylet/raylet --socket", "Ray"),
        ("python -c from multiprocessing.spawn import spawn_main", "other"),
    ],
)
def test_a_command_line_has_the_role_of_its_process(command_line, role):
    assert peaks.role_of(command_line) == role


def test_the_peak_memory_is_read_in_mib():
    assert peaks.peak_mib("Name:\tx\nVmPeak:\t 9 kB\nVmHWM:\t  204800 kB\nVmRSS:\t 1 kB\n") == 200
    assert peaks.peak_mib("Name:\tx\nState:\tZ (zombie)\n") is None


def test_the_peak_includes_memory_that_was_freed():
    code = "data = bytearray(200 << 20); del data; print('ready', flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    found = peaks.PeakWatcher(os.getpid()).stop()
    child.communicate("\n")
    assert any(200 <= peak < 400 for peak in found["other"])


def test_a_forked_child_is_not_counted_with_its_parent():
    code = (
        "import os; data = bytearray(200 << 20); child = os.fork()\n"
        "if child: print('ready', flush=True); input(); os.kill(child, 9); os.wait()\n"
        "else:\n"
        "    import time; time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    found = peaks.PeakWatcher(os.getpid()).stop()
    child.communicate("\n")
    assert sum(200 <= peak < 400 for peak in found["other"]) == 1
