"""Workers that are stopped, killed or lost again and again, with real processes."""

import asyncio
import textwrap

import pytest

from verl.config.reward import CustomRewardFunctionConfig, RewardConfig
from verl.workers.reward import RewardError, RewardLoop
from verl.workers.reward.pool import DEATHS_IN_A_ROW, FAILED_STARTS

# `once(name)` is True for the first caller in all processes.
SOURCE = """
import os, signal
from pathlib import Path

def once(name):
    try:
        os.close(os.open(Path(__file__).with_name(name), os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        return False

"""


@pytest.fixture
def start(tmp_path):
    loops = []

    def build(body, **settings):
        path = tmp_path / "reward.py"
        path.write_text(SOURCE + textwrap.dedent(body))
        function = CustomRewardFunctionConfig(path=str(path), name="compute_score")
        loops.append(RewardLoop(RewardConfig(custom_reward_function=function, num_workers=1, **settings)))
        return loops[-1]

    yield build
    for loop in loops:
        loop.close()


def score(loop, *answers):
    async def gather():
        return await asyncio.gather(*(loop.score("d", answer, "", None) for answer in answers))

    return asyncio.run(gather())


@pytest.mark.slow
@pytest.mark.parametrize("keyword", ["def", "async def"])
@pytest.mark.parametrize(("name", "timeout"), [("SIGSTOP", 1.0), ("SIGKILL", 60.0)])
def test_a_sample_whose_worker_is_stopped_or_killed_is_scored_once_more(start, keyword, name, timeout):
    loop = start(
        f"""
        {keyword} compute_score(data_source, solution_str, ground_truth, extra_info):
            if solution_str == "always" or (solution_str == "once" and once("struck")):
                os.kill(os.getpid(), signal.{name})
            return 1.0
        """,
        timeout=timeout,
    )
    results = score(loop, "good", "once", "good")
    assert [(result.score, result.error) for result in results] == [(1.0, None)] * 3
    (result,) = score(loop, "always")
    assert (result.score, result.error) == (0.0, "timeout" if name == "SIGSTOP" else "exception")


LOADING = """
import time
if "{how}" == "once" and Path(__file__).with_name("died").exists() and once("died too"):
    os.kill(os.getpid(), signal.SIGKILL)
if "{how}" == "always" and Path(__file__).with_name("died").exists():
    os.kill(os.getpid(), signal.SIGKILL)

def compute_score(data_source, solution_str, ground_truth, extra_info):
    if solution_str == "die" and once("died"):
        os._exit(1)
    return 1.0
"""


def test_a_replacement_that_is_killed_while_it_loads_is_replaced(start, tmp_path):
    loop = start(LOADING.format(how="once"))
    assert [result.error for result in score(loop, "die", "good", "good")] == ["exception", None, None]
    assert (tmp_path / "died too").exists()


def test_the_pool_ends_if_no_replacement_loads(start):
    loop = start(LOADING.format(how="always"))
    with pytest.raises(RewardError, match=r"ended \(signal SIGKILL\) while loading .*reward.py"):
        score(loop, "die", "good", "good")
    assert loop._pool._failed_starts == FAILED_STARTS + 1


@pytest.mark.slow
def test_the_pool_gives_up_if_every_sample_ends_its_process(start, tmp_path):
    loop = start(
        """
        def compute_score(data_source, solution_str, ground_truth, extra_info):
            with Path(__file__).with_name("deaths").open("a") as file:
                file.write("x")
            os._exit(7)
        """
    )
    message = rf"{DEATHS_IN_A_ROW} reward workers ended in a row without a score; .*exit code 7"
    with pytest.raises(RewardError, match=message):
        score(loop, *["x"] * (DEATHS_IN_A_ROW + 20))
    assert len((tmp_path / "deaths").read_text()) == DEATHS_IN_A_ROW
