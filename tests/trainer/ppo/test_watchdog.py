"""The watchdog with real processes that are stopped; only their work is missing."""

import asyncio
import os
import signal
import subprocess
import sys

import pytest
import ray

from verl.config.watchdog import WatchdogConfig
from verl.trainer.ppo.watchdog import Watchdog, WatchdogError
from verl.utils.heartbeat import current_beacon, heartbeat_environment

pytestmark = pytest.mark.e2e

PROGRAM = """
from verl.utils.heartbeat import send_heartbeats_from_environment
send_heartbeats_from_environment()
def long_computation():
    while True:
        sum(range(1000))
long_computation()
"""
ROLES = ("replica 1", "trainer rank 0", "reward worker 2", "teacher engine 0")
LIMIT = 5


@pytest.fixture
def session():
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


async def until(condition):
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.05)


@pytest.mark.slow
async def test_each_kind_of_stopped_process_has_its_consequence(session, tmp_path, caplog):
    directory = tmp_path / "stacks"
    limits = {f"{kind}_timeout_s": LIMIT for kind in ("engine", "trainer", "reward")}
    watchdog = Watchdog(WatchdogConfig(heartbeat_s=0.1, **limits), directory)
    await watchdog.open()
    killed = []

    async def kill(rank, reason):
        killed.append((rank, reason))

    watchdog.kill_replica = kill
    processes = {}
    try:
        for role in ROLES:
            environment = {**os.environ, **heartbeat_environment(role)}
            processes[role] = subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment)
        await until(lambda: {peer.role for peer in watchdog._peers} == set(ROLES))
        # Longer than the limits: a computation is not mistaken for a hang.
        await asyncio.sleep(2 * LIMIT)
        assert not killed and not caplog.messages and all(process.poll() is None for process in processes.values())

        def stop(role):
            processes[role].send_signal(signal.SIGSTOP)
            return f"{role} (pid {processes[role].pid} on"

        named = stop("reward worker 2")
        await until(lambda: processes["reward worker 2"].poll() == -signal.SIGKILL)
        assert named in caplog.messages[-1] and "it is stopped by a signal (SIGSTOP). It is replaced" in caplog.text

        named = stop("replica 1")
        await until(lambda: killed)
        assert killed[0][0] == 1 and killed[0][1].startswith(named) and str(directory) in killed[0][1]
        assert (
            "in long_computation" in (directory / f"trainer_rank_0.{processes['trainer rank 0'].pid}.txt").read_text()
        )

        stop("teacher engine 0")
        await until(lambda: processes["teacher engine 0"].poll() == -signal.SIGKILL)

        named = stop("trainer rank 0")
        with pytest.raises(WatchdogError) as raised:
            async with asyncio.timeout(120):
                await watchdog.failure()
        assert str(raised.value).startswith(named)
        assert processes["trainer rank 0"].wait(60) == -signal.SIGKILL
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
        await watchdog.close()
    assert current_beacon() is None
    assert all(file.stat().st_size for file in directory.iterdir())


@pytest.mark.slow
async def test_an_overdue_call_ends_the_run(session, tmp_path):
    watchdog = Watchdog(WatchdogConfig(phase_timeout_s=3), tmp_path / "stacks")
    watchdog.on_overdue("update_actor has not ended after 3 s on trainer rank(s) 1")
    with pytest.raises(WatchdogError, match=r"on trainer rank\(s\) 1 \(trainer.watchdog.phase_timeout_s=3\)"):
        await watchdog.failure()
    await watchdog.close()
    (file,) = (tmp_path / "stacks").iterdir()
    assert "test_watchdog.py" in file.read_text() or "asyncio" in file.read_text()
