"""The reward loop with real worker processes: valid return values, and every kind of failure."""

import asyncio
import logging
import math
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fixtures.tiny import write_char_tokenizer
from verl.config.reward import CustomRewardFunctionConfig, RewardConfig, RewardManagerConfig
from verl.config.reward_model import RewardModelConfig
from verl.workers.reward import RewardError, RewardFunctionError, RewardLoop, RewardResult, extra_columns
from verl.workers.reward.counts import check_scored, reward_metrics

SIGNATURE = "compute_score(data_source, solution_str, ground_truth, extra_info)"
SHORT = 1.0
"""Timeout in seconds of tests in which a sample hangs; in others none must reach its own, however slow the machine."""


def config(path=None, **over):
    """The `reward` section of a config."""
    values = {"name": "compute_score", "manager": "naive", "num_workers": 2, "timeout": 60.0, "own_kwargs": {}} | over
    function = CustomRewardFunctionConfig(
        path=None if path is None else str(path), name=values.pop("name"), reward_kwargs=values.pop("own_kwargs")
    )
    manager = RewardManagerConfig(name=values.pop("manager"))
    return RewardConfig(custom_reward_function=function, reward_manager=manager, **values)


WAITING = """
import os, time
def wait_for_file(path):
    while not os.path.exists(path):
        time.sleep(0.005)
"""


@pytest.fixture
def start(tmp_path):
    """Give it the source of a reward function (None: the built-in scorers); loops are closed and checked at the end."""
    (tmp_path / "waiting.py").write_text(WAITING)
    loops = []

    def build(source=None, *, data_sources=(), components=(), **over):
        path = None
        if source is not None:
            path = tmp_path / f"reward_{len(loops)}.py"
            path.write_text(textwrap.dedent(source))
        loops.append(RewardLoop(config(path, **over), data_sources=data_sources, components=components))
        return loops[-1]

    yield build
    for loop in loops:
        pids = loop.worker_pids()
        loop.close()
        assert not [pid for pid in pids if alive(pid)]


def alive(pid):
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids, seconds=60.0):
    end = time.monotonic() + seconds
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < end:
        time.sleep(0.02)
    return left


def wait_until_ready(loop):
    """The constructor waits for the first worker only; tests of how work is shared need all of them."""
    asyncio.run(until(lambda: all(worker.ready for worker in loop._pool._workers)))


async def until(condition, seconds=60.0):
    """Wait until `condition()` holds; the limit is for tests that hang."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def score(loop, *answers, truth="truth"):
    """Score the answers at the same time, in order."""

    async def gather():
        return await asyncio.gather(*(loop.score("d", answer, truth, {"i": i}) for i, answer in enumerate(answers)))

    return asyncio.run(gather())


def test_a_sync_function_gets_its_arguments_by_keyword(start):
    loop = start(
        """
        def compute_score(extra_info, ground_truth, solution_str, data_source, bonus):
            return {"score": len(solution_str) + bonus, "seen": [data_source, ground_truth, extra_info["i"]]}
        """,
        reward_kwargs={"bonus": 0.5},
    )
    results = score(loop, "ab", "abc")
    assert [result.score for result in results] == [2.5, 3.5]
    assert [result.extra for result in results] == [{"seen": ["d", "truth", 0]}, {"seen": ["d", "truth", 1]}]
    assert all(result.error is None for result in results)


def test_the_scorer_gets_the_keywords_of_both_sections_but_not_the_managers(start):
    for manager in ("naive", "dapo", "gdpo"):
        loop = start(
            """
            def compute_score(a, b, **rest):
                return {"score": a + b, "names": sorted(rest)}
            """,
            manager=manager,
            reward_kwargs={"a": 1, "max_resp_len": 8, "overlong_buffer_cfg": {"enable": False}},
            own_kwargs={"b": 2},
        )
        (result,) = score(loop, "x")
        assert (result.score, result.extra) == (
            3.0,
            {"names": ["data_source", "extra_info", "ground_truth", "solution_str"]},
        )


@pytest.mark.parametrize("count", [1, 3])
def test_num_workers_is_the_number_of_processes(start, count):
    loop = start(
        f"""
        import os, time
        def {SIGNATURE}:
            time.sleep(0.05)
            return {{"score": 1.0, "pid": os.getpid()}}
        """,
        num_workers=count,
    )
    wait_until_ready(loop)
    assert len(loop.worker_pids()) == count
    assert {result.extra["pid"] for result in score(loop, *"x" * 12)} == set(loop.worker_pids())


def test_default_is_one_worker_per_core_and_at_most_8(start, monkeypatch):
    for cores, count in ((2, 2), (64, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)))
        monkeypatch.setattr(
            "verl.workers.reward.loop.WorkerPool",
            lambda setup, count: SimpleNamespace(close=int, pids=list, count=count),
        )
        assert start(f"def {SIGNATURE}: return 1.0", num_workers=None)._pool.count == count


DAPO = {"max_resp_len": 10, "overlong_buffer_cfg": {"enable": True, "len": 4, "penalty_factor": 0.5, "log": True}}


def test_dapo_subtracts_a_length_penalty(start):
    loop = start(
        f"""
        def {SIGNATURE}:
            if solution_str == "bad":
                raise KeyError
            return 1.0 if solution_str == "number" else {{"score": 2, "acc": True}}
        """,
        manager="dapo",
        reward_kwargs=DAPO,
    )

    async def gather():
        samples = [("number", 6), ("number", 7), ("dict", 10), ("dict", 0), ("bad", 10)]
        return await asyncio.gather(*(loop.score("d", text, "", {}, response_length=n) for text, n in samples))

    results = asyncio.run(gather())
    assert [result.score for result in results] == [1.0, 0.875, 1.5, 2.0, 0.0]
    assert results[1].extra == {"acc": 1.0, "score": 1.0, "overlong_reward": -0.125, "overlong": True}
    assert results[3].extra == {"acc": True, "score": 2.0, "overlong_reward": 0.0, "overlong": False}
    assert results[4].extra == {}
    with pytest.raises(ValueError, match="name=dapo: pass response_length"):
        score(loop, "number")


def test_gdpo_ends_the_run_if_a_component_is_missing(start):
    loop = start(
        f"""
        def {SIGNATURE}:
            if solution_str == "slow":
                raise KeyError
            return {{"score": 1.0, "form": 1, "short": True}} if solution_str == "all" else {{"score": 1.0, "form": 1}}
        """,
        manager="gdpo",
        components=["form", "short"],
    )
    good, failed = score(loop, "all", "slow")
    assert (good.score, good.extra) == (1.0, {"form": 1.0, "short": 1.0})
    assert (failed.score, failed.extra, failed.error) == (0.0, {}, "exception")
    assert extra_columns([good, failed]) == {"form": [1.0, 0.0], "short": [1.0, 0.0]}
    with pytest.raises(RewardError, match=r"data_source=d: algorithm.gdpo_reward_keys=.*no short.*score, form"):
        score(loop, "some")


def test_an_async_function_runs_many_samples_at_once(start):
    loop = start(
        f"""
        import asyncio
        all_here = asyncio.Barrier(50)
        async def {SIGNATURE}:
            await all_here.wait()
            return float(solution_str)
        """,
        num_workers=1,
    )
    results = score(loop, *map(str, range(50)))
    assert [result.score for result in results] == [float(i) for i in range(50)]


@pytest.mark.parametrize("keyword", ["def", "async def"])
def test_accepted_and_rejected_return_values(start, keyword):
    loop = start(
        f"""
        import decimal, fractions
        import numpy as np
        {keyword} {SIGNATURE}:
            return eval(solution_str)
        """,
    )
    good = {
        "1": 1.0,
        "True": 1.0,
        "0.25": 0.25,
        "np.float32(0.5)": 0.5,
        "np.array(2)": 2.0,
        "np.int64(3)": 3.0,
        "{'score': 4}": 4.0,
        "{'score': np.float64(5)}": 5.0,
        "decimal.Decimal('0.5')": 0.5,
        "{'score': fractions.Fraction(1, 4)}": 0.25,
        "{'score': 1, 'x': object()}": 1.0,
    }
    bad = ["'1.0'", "None", "float('nan')", "float('inf')", "{'acc': 1}", "[1.0]", "1j", "10**400", "np.ones(2)"]
    bad += ["{'score': '1'}", "np.array('1')", "decimal.Decimal('nan')", "decimal.Decimal('sNaN')"]
    results = score(loop, *good, *bad)
    for (source, expected), result in zip(good.items(), results, strict=False):
        assert (result.score, result.error) == (expected, None), source
        assert type(result.score) is float
    for source, result in zip(bad, results[len(good) :], strict=True):
        assert (result.score, result.extra) == (0.0, {}), source
        assert result.error == ("exception" if source == "np.ones(2)" else "bad_return"), (source, result)
    assert reward_metrics(results)["reward/num_errors"] == len(bad)


def test_extra_values_become_built_in_types(start):
    loop = start(
        f"""
        import dataclasses, enum
        import numpy as np
        class Level(enum.IntEnum):
            HIGH = 3
        class Text(str):
            pass
        def {SIGNATURE}:
            return dict(score=1, a=np.float32(0.5), b=np.arange(3), c=(1, {{"d": None}}), e=Text("t"), f=Level.HIGH,
                        g=np.bool_(True))
        """,
    )
    (result,) = score(loop, "x")
    assert result.extra == {"a": 0.5, "b": [0, 1, 2], "c": [1, {"d": None}], "e": "t", "f": 3, "g": True}
    assert [type(result.extra[key]) for key in "abcefg"] == [float, list, list, str, int, bool]


EXTRAS = {
    # expression: stored value
    "sympy.Integer(3)": 3,
    "sympy.Rational(1, 4)": 0.25,
    "sympy.Float(0.5)": 0.5,
    "sympy.true": True,
    "sympy.sqrt(2)": "sqrt(2)",
    "[sympy.Symbol('x') + 1]": ["x + 1"],
    "decimal.Decimal('1.5')": 1.5,
    "fractions.Fraction(1, 2)": 0.5,
    "enum.Enum('Level', {'HIGH': 'high'}).HIGH": "high",
    "enum.IntEnum('Level', {'HIGH': 7}).HIGH": 7,
    "datetime.date(2026, 1, 2)": "2026-01-02",
    "datetime.datetime(2026, 1, 2, 3, 4)": "2026-01-02 03:04:00",
    "datetime.timedelta(seconds=90)": "0:01:30",
    "pathlib.Path('a/b')": "a/b",
    "uuid.UUID(int=1)": "00000000-0000-0000-0000-000000000001",
    "1j": "1j",
    "b'\\xc3\\xbc \\xff'": "\u00fc \\xff",
    "{'b', 'a'}": ["a", "b"],
    "frozenset({3})": [3],
    "np.float16(0.5)": 0.5,
    "np.datetime64('2026-01-02')": "2026-01-02",
    "np.array([[1, 2]])": [[1, 2]],
    "torch.tensor(2)": 2,
    "torch.tensor(0.5, dtype=torch.bfloat16)": 0.5,
    "torch.tensor([1.0, 2.0], requires_grad=True)": [1.0, 2.0],
    "{1: None, 'two': (1,)}": {"1": None, "two": [1]},
    "type('Thing', (), {'__str__': lambda self: 'a thing'})()": "a thing",
}
UNREADABLE = {
    "torch.empty(2, device='meta')": "NotImplementedError",
    "type('Bad', (), {'__str__': lambda self: 1 / 0})()": "ZeroDivisionError",
    "cyclic": "RecursionError",
}


def test_no_extra_value_costs_the_score(start, caplog):
    loop = start(
        f"""
        import datetime, decimal, enum, fractions, pathlib, uuid
        import numpy as np, sympy, torch
        cyclic = []
        cyclic.append(cyclic)
        def {SIGNATURE}:
            return {{"score": 1.0, "kept": 1, "value": eval(solution_str)}}
        """,
        num_workers=1,
    )
    with caplog.at_level(logging.WARNING):
        results = score(loop, *EXTRAS, *UNREADABLE)
    assert [(result.score, result.error, result.detail) for result in results] == [(1.0, None, "")] * len(results)
    found = dict(zip(EXTRAS, results, strict=False))
    assert {source: result.extra["value"] for source, result in found.items()} == EXTRAS
    for source, result in found.items():
        assert type(result.extra["value"]) is type(EXTRAS[source]), source
    assert [result.extra for result in results[len(EXTRAS) :]] == [{"kept": 1}] * len(UNREADABLE)
    messages = [record.getMessage() for record in caplog.records]
    for name in ("Thing", "Pow", *UNREADABLE.values()):
        assert [name in message and "'value'" in message for message in messages].count(True) == 1, (name, messages)


def test_an_extra_value_with_a_reserved_name_is_renamed_with_a_warning(start, caplog):
    loop = start(
        f"""
        def {SIGNATURE}:
            return {{"score": 1.0, "output": "mine", "extra_output": 2, "gts": 3, "advantages": 4, "reward": 5, "n": 6}}
        """
    )
    with caplog.at_level(logging.WARNING):
        results = score(loop, "a", "b")
    renamed = {"extra_extra_output": "mine", "extra_output": 2, "extra_gts": 3, "extra_advantages": 4}
    assert [result.extra for result in results] == [renamed | {"extra_reward": 5, "n": 6}] * 2
    assert len(caplog.records) == 4, "one warning for each name"
    assert "'output', a name with another meaning; it is stored as 'extra_extra_output'" in caplog.text
    with pytest.raises(ValueError, match="gdpo_reward_keys: values has another meaning"):
        start(f"def {SIGNATURE}: return 1", manager="gdpo", components=["form", "values"])


def test_half_a_character_in_extra_values_is_replaced(start):
    loop = start(f"""def {SIGNATURE}: return dict(score=1, a="x\\ud83d", **{{"\\udc80": ["\\ud83d\\ude00"]}})""")
    assert score(loop, "x")[0].extra == {"a": "x\ufffd", "\ufffd": ["\U0001f600"]}


def test_a_plain_number_is_also_reported_as_acc(start):
    loop = start(f"def {SIGNATURE}: return 1")
    assert score(loop, "x")[0].extra == {"acc": 1.0}


@pytest.mark.parametrize("keyword", ["def", "async def"])
def test_a_raise_scores_zero_and_only_the_first_traceback_is_logged(start, caplog, keyword):
    loop = start(
        f"""
        def helper(text):
            raise KeyError("lost " + text)
        {keyword} {SIGNATURE}:
            return 1.0 if solution_str == "good" else helper(solution_str)
        """
    )
    with caplog.at_level(logging.WARNING):
        first = score(loop, "bad1")[0]
        others = score(loop, "good", "bad2", "bad3")
    assert (first.score, first.error) == (0.0, "exception")
    assert [result.score for result in others] == [1.0, 0.0, 0.0]
    assert reward_metrics([first, *others])["reward/num_errors"] == 3
    (record,) = caplog.records
    for part in ("in compute_score", "in helper", "KeyError: 'lost bad1'", "data_source=d"):
        assert part in record.getMessage()
    assert "worker.py" not in record.getMessage()


HANGS = {
    "sleep": "time.sleep(1000)",
    "loop": "while True: pass",
    "swallow": """
                while True:
                    try:
                        time.sleep(1000)
                    except BaseException:
                        pass""",
    "regex": "re.match('(a+)+$', 'a' * 60 + 'b')",
    "sigterm": "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)",
}


@pytest.mark.parametrize(
    ("keyword", "how"), [*(("def", how) for how in HANGS), ("async def", "loop"), ("async def", "regex")]
)
def test_a_hang_fails_only_its_own_sample(start, keyword, how):
    loop = start(
        f"""
        import re, signal, time
        {keyword} {SIGNATURE}:
            if solution_str == "hang":
                {HANGS[how]}
            return 1.0
        """,
        timeout=SHORT,
    )
    before = loop.worker_pids()
    results = score(loop, *["good"] * 40, "hang", *["good"] * 40)
    assert [i for i, result in enumerate(results) if result.error] == [40]
    assert (results[40].error, results[40].score) == ("timeout", 0.0)
    assert results[40].seconds >= SHORT
    assert reward_metrics(results)["reward/num_timeouts"] == 1
    assert reward_metrics(results)["reward/seconds_max"] >= SHORT
    assert len([pid for pid in before if alive(pid)]) == 1  # the hung one is gone
    assert score(loop, "good")[0].score == 1.0
    assert len(loop.worker_pids()) == 2  # and replaced


def test_an_await_that_never_ends_is_cancelled_without_a_new_worker(start):
    loop = start(
        f"""
        import asyncio
        async def {SIGNATURE}:
            try:
                await asyncio.sleep(1000 if solution_str == "hang" else 0)
            except asyncio.CancelledError:
                await asyncio.sleep(1000)  # even one that does not obey
            return 1.0
        """,
        timeout=SHORT,
    )
    before = loop.worker_pids()
    results = score(loop, "good", "hang", "good")
    assert [result.error for result in results] == [None, "timeout", None]
    assert loop.worker_pids() == before


def test_a_blocked_event_loop_fails_the_blocking_sample_and_repeats_the_waiting_ones(start):
    loop = start(
        f"""
        import asyncio, time
        async def {SIGNATURE}:
            await asyncio.sleep(0.05)
            if solution_str == "block":
                time.sleep(1000)
            await asyncio.sleep(0.05)
            return 1.0
        """,
        num_workers=1,
        timeout=SHORT,
    )
    results = score(loop, *["good"] * 5, "block", *["good"] * 5)
    assert [result.error for result in results] == [None] * 5 + ["timeout"] + [None] * 5


@pytest.mark.slow
def test_time_in_the_queue_does_not_count(start):
    for keyword in ("def", "async def"):  # an async function without an await also blocks its queue
        loop = start(
            f"""
            import time
            {keyword} {SIGNATURE}:
                time.sleep(0.1)
                return 1.0
            """,
            num_workers=1,
            timeout=SHORT,
        )
        assert all(result.error is None for result in score(loop, *["x"] * 15))  # longer than SHORT in all


@pytest.mark.parametrize("keyword", ["def", "async def"])
@pytest.mark.parametrize("how", ["os._exit(3)", "os.kill(os.getpid(), 11)", "sys.exit(3)"])
def test_a_function_that_ends_its_process_fails_its_sample(start, keyword, how):
    loop = start(
        f"""
        import os, sys
        {keyword} {SIGNATURE}:
            if solution_str == "die":
                {how}
            return 1.0
        """
    )
    results = score(loop, *["good"] * 10, "die", *["good"] * 10)
    assert [i for i, result in enumerate(results) if result.error] == [10]
    assert results[10].error == "exception"
    assert any(part in results[10].detail for part in ("exit code 3", "SIGSEGV", "SystemExit: 3"))


def test_child_processes_of_a_hung_function_are_killed(start, tmp_path):
    loop = start(
        f"""
        import subprocess
        def {SIGNATURE}:
            child = subprocess.Popen(["sleep", "1000"])
            open(solution_str, "w").write(str(child.pid))
            child.wait()
        """,
        timeout=SHORT,
    )
    note = tmp_path / "pid"
    assert score(loop, str(note))[0].error == "timeout"
    assert not wait_until_gone([int(note.read_text())])


def test_megabytes_of_extra_values_pass_and_too_many_are_dropped(start, caplog):
    loop = start(
        f"""
        def {SIGNATURE}:
            return {{"score": 1.0, "log": "x" * int(solution_str), "acc": 1}}
        """,
    )
    with caplog.at_level(logging.WARNING):
        small, large, huge = score(loop, "3", str(5 * 2**20), str(40 * 2**20))
    assert (small.score, large.score) == (1.0, 1.0)
    assert len(large.extra["log"]) == 5 * 2**20
    assert (huge.score, huge.extra, huge.error) == (1.0, {"acc": 1}, None)
    assert "more than 16 MiB of extra values for a sample; dropped: log" in caplog.text


def test_the_callers_event_loop_is_never_blocked(start, tmp_path):
    """Each sample is done only when the caller's loop, which waits for it, has made a file."""
    loop = start(
        f"""
        from waiting import wait_for_file
        def {SIGNATURE}:
            wait_for_file(solution_str)
            return 1.0
        """,
        timeout=2.0,
    )

    async def watch():
        paths = [tmp_path / f"{i}" for i in range(20)]

        async def make():
            for path in paths:
                await asyncio.sleep(0.005)
                if path != paths[3]:  # its sample hangs, and its worker is replaced
                    path.touch()

        maker = asyncio.create_task(make())
        results = await asyncio.gather(*(loop.score("d", str(path), "t", {}) for path in paths))
        await maker
        return results

    assert [i for i, result in enumerate(asyncio.run(watch())) if result.error] == [3]


def test_scoring_starts_with_the_first_sample(start):
    loop = start(f"def {SIGNATURE}: return 1.0")

    async def trickle():
        first = await asyncio.wait_for(loop.score("d", "x", "t", {}), 60)  # nothing else is coming
        second = await asyncio.wait_for(loop.score("d", "y", "t", {}), 60)
        return first, second

    assert [result.score for result in asyncio.run(trickle())] == [1.0, 1.0]


def test_a_cancelled_caller_is_not_counted_and_its_sample_not_scored(start, tmp_path):
    loop = start(
        f"""
        from waiting import wait_for_file
        def {SIGNATURE}:
            open(ground_truth + "/seen/" + solution_str, "w").close()
            wait_for_file(ground_truth + "/go")
            return 1.0
        """,
        num_workers=1,
    )
    (tmp_path / "seen").mkdir()

    async def cancel():
        tasks = [asyncio.create_task(loop.score("d", name, str(tmp_path), {})) for name in "abcd"]
        await until((tmp_path / "seen" / "a").exists)
        for task in tasks[:3]:
            task.cancel()
        await asyncio.gather(*tasks[:3], return_exceptions=True)
        (tmp_path / "go").touch()
        return await tasks[3]

    assert asyncio.run(cancel()).score == 1.0
    assert sorted(path.name for path in (tmp_path / "seen").iterdir()) == ["a", "d"]


def test_failure_of_every_sample_stops_the_run(start):
    loop = start(f"def {SIGNATURE}: return 1.0 if solution_str == 'good' else 1 / 0")
    check_scored([], loop.scorer)
    check_scored(score(loop, "bad", "good"), loop.scorer)
    failed = score(loop, "bad", "bad")
    with pytest.raises(RewardError, match=r"(?s)all 2 samples of this step.*2 errors.*ZeroDivisionError") as caught:
        check_scored(failed, loop.scorer)
    assert loop.scorer in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert reward_metrics([]) == dict.fromkeys(
        ["reward/num_errors", "reward/num_timeouts", "reward/seconds_mean", "reward/seconds_max"], 0.0
    )


def test_seconds_measure_the_scoring(start):
    loop = start(
        f"""
        import time
        def {SIGNATURE}:
            begin = time.monotonic()
            time.sleep(float(solution_str))
            return {{"score": 1.0, "own": time.monotonic() - begin}}
        """,
        num_workers=1,
    )
    begin = time.monotonic()
    results = score(loop, "0.1", "0.2", "0.1")
    took = time.monotonic() - begin
    seconds = [result.seconds for result in results]
    assert all(result.extra["own"] <= result.seconds for result in results)
    assert sum(seconds) <= took  # samples run one by one; no duration includes the wait
    metrics = reward_metrics(results)
    assert metrics["reward/seconds_max"] == max(seconds)
    assert metrics["reward/seconds_mean"] == pytest.approx(sum(seconds) / 3)


def test_a_plain_function_may_return_a_coroutine(start):
    loop = start(
        f"""
        async def work(text):
            return len(text)
        def {SIGNATURE}:
            return work(solution_str)
        """
    )
    assert score(loop, "abc")[0].score == 3.0


def test_a_function_may_use_processes_that_are_spawned(start):
    loop = start(
        f"""
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor
        def size(text):
            return len(text)
        def {SIGNATURE}:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                return pool.submit(size, solution_str).result()
        """,
        num_workers=1,
    )
    (result,) = score(loop, "abc")
    assert result.score == 3.0, result.detail


def test_a_callable_object_may_import_a_neighboring_file(start, tmp_path):
    (tmp_path / "beside_the_reward.py").write_text("FACTOR = 2")
    loop = start(
        """
        from beside_the_reward import FACTOR
        class Score:
            async def __call__(self, solution_str, **rest):
                return FACTOR * len(solution_str)
        best = Score()
        """,
        name="best",
    )
    assert score(loop, "abc")[0].score == 6.0


@pytest.mark.parametrize(
    ("source", "over", "message"),
    [
        (
            "def other(): pass\ndef _hidden(): pass",
            {},
            r"compute_score does not exist in .*: it has other; set",
        ),
        ("compute_score = 3", {}, "compute_score is not a function in .*: it has no function"),
        ("import not_there_at_all", {}, r"does not import \(reward_0.py, line 1\): ModuleNotFoundError: No module"),
        ("x = 1\ndef compute_score(:", {}, r"does not import \(reward_0.py.*SyntaxError: invalid syntax"),
        ("import sys\nsys.exit(3)", {}, r"does not import \(reward_0.py, line 2\): SystemExit: 3"),
        ("import os\nos._exit(3)", {}, r"a reward worker ended \(exit code 3\) while loading .*reward_0.py"),
        ("def compute_score(solution_str): pass", {}, "cannot be called with the keywords data_source, solution_str"),
        (f"def {SIGNATURE}: pass", {"reward_kwargs": {"bonus": 1}}, "bonus.*reward.reward_kwargs"),
        (f"def {SIGNATURE}: pass", {"reward_kwargs": {"extra_info": 1}}, "extra_info is set for every sample"),
        (f"def {SIGNATURE}: pass", {"name": "compute"}, "compute does not exist.*it has compute_score"),
    ],
)
def test_a_function_that_does_not_load_is_an_error_with_its_name(start, source, over, message):
    with pytest.raises(RewardFunctionError, match=message) as caught:
        start(source, **over)
    assert isinstance(caught.value, ValueError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(RewardFunctionError, match=r"reward.custom_reward_function.path=.*none.py: no such file"):
        RewardLoop(config(tmp_path / "none.py"))
    with pytest.raises(RewardFunctionError, match="no such file"):
        RewardLoop(config(tmp_path))


@pytest.mark.parametrize(
    ("over", "error", "message"),
    [
        ({"manager": "prime"}, NotImplementedError, "reward.reward_manager.name=prime is not supported yet; .*naive"),
        ({"manager": "dago"}, ValueError, "dago is unknown; use one of dapo, gdpo, naive"),
        (
            {"manager": "dapo", "reward_kwargs": {"overlong_buffer_cfg": {"enable": 1}}},
            ValueError,
            "enable=1: must be True",
        ),
        (
            {"reward_kwargs": {"a": 1}, "own_kwargs": {"a": 2}},
            ValueError,
            "reward_kwargs.a=2: reward.reward_kwargs.a is 1",
        ),
        ({"timeout": 0}, ValueError, "reward.timeout=0"),
        ({"timeout": math.inf}, ValueError, "reward.timeout=inf"),
        ({"num_workers": 0}, ValueError, "reward.num_workers=0"),
        ({"reward_kwargs": {"f": lambda: 1}}, ValueError, "reward.reward_kwargs must hold plain values"),
    ],
)
def test_settings_out_of_range_are_errors(over, error, message):
    with pytest.raises(error, match=message):
        RewardLoop(config(**over))


def test_a_function_that_no_longer_loads_ends_the_run(start, tmp_path):
    loop = start(
        f"""
        import os
        def {SIGNATURE}:
            os._exit(0) if solution_str == "die" else None
            return 1.0
        """,
        num_workers=1,
    )
    (tmp_path / "reward_0.py").write_text("raise OSError('gone')")
    with pytest.raises(RewardError, match="OSError: gone"):
        score(loop, "die", "good", "good")
    with pytest.raises(RewardError, match="OSError: gone"):
        score(loop, "good")


@pytest.mark.slow
def test_built_in_scorers_use_the_same_path(start):
    sources = ["openai/gsm8k", "math_dapo"]  # the others are prepared when their first sample comes
    loop = start(data_sources=sources)

    async def gather():
        return await asyncio.gather(
            loop.score("openai/gsm8k", "#### 42", "42", {"index": np.int64(1)}),
            loop.score("math_dapo", "Answer: 41", "42", None),
            loop.score("reasoning_gym/spell_backward", "tac", "tac", {}),
            loop.score("lighteval/MATH", r"\boxed{\frac12}", "0.5", {}),
            loop.score("who/knows", "", "", {}),
        )

    gsm8k, dapo, gym, latex, unknown = asyncio.run(gather())
    assert (gsm8k.score, gsm8k.extra) == (1.0, {"acc": 1.0})
    assert (dapo.score, dapo.extra) == (-1.0, {"acc": False, "pred": "41"})
    assert (gym.score, latex.score) == (1.0, 1.0)
    assert unknown.error == "exception"
    assert "who/knows has no built-in scorer" in unknown.detail


def test_the_import_of_a_scorer_does_not_count_for_its_sample(start, tmp_path, monkeypatch):
    package = tmp_path / "reasoning_gym"
    package.mkdir()
    (package / "__init__.py").write_text(
        f"import time; time.sleep({2 * SHORT})\ndef get_score_answer_fn(task): return lambda answer, entry: 1.0"
    )
    (package / "factory.py").write_text("DATASETS = {'slow': None}")
    monkeypatch.syspath_prepend(tmp_path)
    loop = start(timeout=SHORT)
    result = asyncio.run(loop.score("reasoning_gym/slow", "x", "x", {}))
    assert (result.score, result.error) == (1.0, None)


def test_a_source_without_a_scorer_is_reported_at_the_start():
    with pytest.raises(RewardFunctionError, match="data_source=who/knows has no built-in scorer"):
        RewardLoop(config(), data_sources=["openai/gsm8k", "who/knows"])


@pytest.mark.parametrize("keyword", ["def", "async def"])
def test_512_trivial_samples_cost_well_below_half_a_second_of_processor_time(start, keyword):
    loop = start(f"{keyword} {SIGNATURE}: return float(len(solution_str))")
    wait_until_ready(loop)
    answers = ["x" * (i % 7) for i in range(512)]
    score(loop, *answers)
    begin = processor_seconds(loop)
    results = score(loop, *answers)
    spent = processor_seconds(loop) - begin
    assert [result.score for result in results] == [float(i % 7) for i in range(512)]
    assert spent < 0.4


def processor_seconds(loop):
    """Processor seconds of this process and the workers; other programs do not affect them."""
    ticks = 0
    for pid in loop.worker_pids():
        ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


@pytest.mark.slow
def test_grouped_samples_are_shared_fairly_and_timed_individually(start, tmp_path):
    loop = start(
        f"""
        import time
        from waiting import wait_for_file
        def {SIGNATURE}:
            wait_for_file(ground_truth)
            time.sleep(float(solution_str))
            return 1.0
        """,
        timeout=3.0,
    )
    wait_until_ready(loop)
    score(loop, *["0"] * 100, truth=tmp_path)  # quick ones: from now on samples travel together
    gate, all_submitted, outcomes = tmp_path / "gate", threading.Event(), []
    loop._pool.submit(("d", "0", str(tmp_path), {}), lambda _: all_submitted.wait(60))  # holds the pool's thread
    for _ in range(40):
        loop._pool.submit(("d", "0.2", str(gate), {}), outcomes.append)
    all_submitted.set()
    asyncio.run(until(lambda: all(worker.running for worker in loop._pool._workers)))
    # On a busy machine the quick ones were slow, and fewer travel together; more than half never do.
    assert all(len(worker.running) <= 20 for worker in loop._pool._workers)
    gate.touch()
    asyncio.run(until(lambda: len(outcomes) == 40))
    assert [outcome.error for outcome in outcomes] == [None] * 40  # a group may take longer than the timeout


def test_a_slow_sample_does_not_delay_later_ones(start, tmp_path):
    loop = start(
        f"""
        import time
        from waiting import wait_for_file
        def {SIGNATURE}:
            wait_for_file(ground_truth) if solution_str == "slow" else time.sleep(0.03)
            return 1.0
        """
    )
    wait_until_ready(loop)
    score(loop, "quick", "quick")
    go = tmp_path / "go"

    async def gather():
        tasks = [asyncio.create_task(loop.score("d", text, str(go), {})) for text in ["quick"] * 2 + ["slow"]]
        others = await asyncio.gather(*(loop.score("d", "quick", str(go), {}) for _ in range(11)))
        go.touch()
        return others + await asyncio.gather(*tasks)

    assert [result.error for result in asyncio.run(gather())] == [None] * 14


def test_async_samples_are_distributed_over_the_workers(start, tmp_path):
    loop = start(
        f"""
        import asyncio, os
        async def {SIGNATURE}:
            open(ground_truth + "/" + solution_str, "w").close()
            while not os.path.exists(ground_truth + "/go"):
                await asyncio.sleep(0.005)
            return {{"score": 1.0, "pid": os.getpid()}}
        """
    )
    wait_until_ready(loop)

    async def trickle():
        tasks = []
        for i in range(20):
            tasks.append(asyncio.create_task(loop.score("d", str(i), str(tmp_path), {})))
            await until((tmp_path / str(i)).exists)
        (tmp_path / "go").touch()
        return [(await task).extra["pid"] for task in tasks]

    pids = asyncio.run(trickle())
    assert [pids.count(pid) for pid in loop.worker_pids()] == [10, 10]


@pytest.mark.parametrize("keyword", ["def", "async def"])
def test_close_ends_all_workers_and_fails_waiting_samples(start, tmp_path, keyword):
    loop = start(
        f"""
        import os, time
        {keyword} {SIGNATURE}:
            open(f"{{ground_truth}}/{{os.getpid()}}", "w").close()
            time.sleep(1000)
        """
    )
    wait_until_ready(loop)
    pids = loop.worker_pids()

    async def close_while_scoring():
        tasks = [asyncio.create_task(loop.score("d", "x", str(tmp_path), {})) for _ in range(3)]
        await until(lambda: all((tmp_path / str(pid)).exists() for pid in pids))
        await asyncio.to_thread(loop.close)
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(close_while_scoring())
    assert [type(result) for result in results] == [RewardError] * 3  # not waited for until their timeout
    assert not [pid for pid in pids if alive(pid)]
    loop.close()
    with pytest.raises(RewardError, match="closed"):
        score(loop, "x")


DRIVER = """
import asyncio, signal, sys
from verl.config.reward import CustomRewardFunctionConfig, RewardConfig
from verl.workers.reward import RewardLoop

# Tests that a shell runs in the background inherit an ignored Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

async def main(path):
    function = CustomRewardFunctionConfig(path=path)
    loop = RewardLoop(RewardConfig(custom_reward_function=function, num_workers=2, timeout=1000))
    tasks = [asyncio.create_task(loop.score("d", "x", "t", {})) for _ in range(1)]
    await asyncio.sleep(0.3)
    print(*loop.worker_pids(), flush=True)
    await asyncio.sleep(1000 if sys.argv[2] == "wait" else 0)
    if sys.argv[2] == "leave":
        sys.exit(0)

asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, "leave"])
@pytest.mark.parametrize("body", ["while True: pass", "re.match('(a+)+$', 'a' * 60 + 'b')"])
def test_workers_end_with_the_driver(tmp_path, how, body):
    reward = tmp_path / "reward.py"
    reward.write_text(f"import re\ndef {SIGNATURE}:\n    {body}\n")
    mode = how if how == "leave" else "wait"
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(reward), mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    pids = []
    try:
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        assert len(pids) == 2
        assert all(alive(pid) for pid in pids) or mode == "leave"
        if mode == "wait":
            driver.send_signal(how)
        driver.wait(timeout=60)
        assert not wait_until_gone(pids)
    finally:
        driver.kill()
        driver.wait()
        driver.stdout.close()
        for pid in pids:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_a_driver_without_a_main_guard_runs_once(tmp_path):
    """A worker is a fresh interpreter: it must not import the script that started it."""
    reward = tmp_path / "reward.py"
    reward.write_text(f"def {SIGNATURE}: return 1.0\n")
    script = tmp_path / "script.py"
    script.write_text("print('started', flush=True)\n" + DRIVER)
    done = subprocess.run(
        [sys.executable, str(script), str(reward), "leave"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("started") == 1


def test_extra_columns_have_one_value_per_sample():
    results = [
        RewardResult(1.0, {"acc": 1.0, "pred": "a"}, None, 0.0),
        RewardResult(0.0, {}, "timeout", 0.3),
        RewardResult(1.0, {"acc": True, "note": [1]}, None, 0.0),
    ]
    assert extra_columns(results) == {"acc": [1.0, 0.0, True], "pred": ["a", None, None], "note": [None, None, [1]]}
    assert extra_columns([]) == {}


@pytest.mark.slow
def test_a_function_gets_address_and_tokenizer_of_the_reward_model(tmp_path):
    source = tmp_path / "asks.py"
    source.write_text(
        textwrap.dedent(
            """
            async def compute_score(solution_str, reward_router_address, reward_model_tokenizer, **others):
                tokens = reward_model_tokenizer(solution_str)["input_ids"]
                return {"score": len(tokens), "address": reward_router_address, "others": sorted(others)}
            """
        )
    )
    section = config(source)
    section.reward_model = RewardModelConfig(enable=True, model_path=str(write_char_tokenizer(tmp_path / "model")))
    loop = RewardLoop(section, reward_router_address="127.0.0.1:1")
    try:
        (result,) = score(loop, "abc")
    finally:
        loop.close()
    assert (result.score, result.extra["address"]) == (3, "127.0.0.1:1"), result
    assert result.extra["others"] == ["data_source", "extra_info", "ground_truth"]


def test_a_function_that_needs_a_reward_model_names_the_key(start):
    with pytest.raises(
        RewardFunctionError, match=r"come from a reward model, so set reward\.reward_model\.enable=True"
    ):
        start("def compute_score(reward_router_address, **others): return 0.0")


def test_the_time_limit_is_longer_with_a_reward_model():
    assert config(timeout=None).time_limit == 30 and config(timeout=5.0).time_limit == 5
    assert config(timeout=None, reward_model=RewardModelConfig(enable=True)).time_limit == 600
