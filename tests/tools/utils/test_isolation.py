"""User functions that block, exit or hang do not affect the caller's event loop."""

import asyncio
import subprocess
import sys
import threading
import time

import pytest

from verl.tools.utils.isolation import CallFailed, CallTimeout, IsolatedCalls


def add(a, *, b):
    return a + b


async def add_async(a, *, b):
    await asyncio.sleep(0)
    return a + b


def add_awaitable(a, *, b):
    return add_async(a, b=b)


@pytest.mark.parametrize("function", [add, add_async, add_awaitable])
async def test_a_result_is_returned(function):
    assert await IsolatedCalls().call(function, [1], {"b": 2}, timeout=30) == 3


def wait(started, event):
    started.set()
    return event.wait(60)


async def block(started, event):
    return wait(started, event)


@pytest.mark.parametrize("function", [wait, block])
async def test_a_function_that_blocks_does_not_block_the_caller(function):
    started, event = threading.Event(), threading.Event()
    call = asyncio.create_task(IsolatedCalls().call(function, [started, event], timeout=120))
    async with asyncio.timeout(60):
        while not started.is_set():
            await asyncio.sleep(0.005)
    event.set()
    assert await call


async def async_hang():
    await asyncio.Event().wait()


@pytest.mark.parametrize("function", [lambda: time.sleep(600), async_hang])
async def test_a_function_that_hangs_times_out(function):
    async with asyncio.timeout(60):
        with pytest.raises(CallTimeout):
            await IsolatedCalls().call(function, timeout=0.1)


async def test_later_calls_run_after_an_async_function_blocked():
    calls = IsolatedCalls()
    with pytest.raises(CallTimeout):
        await calls.call(block, [threading.Event(), threading.Event()], timeout=0.1)
    assert await calls.call(add_async, [1], {"b": 2}, timeout=30) == 3


def stop_iteration():
    raise StopIteration


async def exit_async():
    sys.exit(3)


async def cancelled():
    raise asyncio.CancelledError("by the tool")


async def cancels_itself():
    asyncio.current_task().cancel()
    await asyncio.sleep(0)


async def interrupted():
    raise KeyboardInterrupt


class Unprintable(BaseException):
    def __str__(self):
        raise RuntimeError("no text")


def unprintable():
    raise Unprintable


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (cancelled, "CancelledError: by the tool"),
        (cancels_itself, "CancelledError"),
        (interrupted, "KeyboardInterrupt"),
        (unprintable, "Unprintable"),
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
        (stop_iteration, "StopIteration"),
        (sys.exit, "SystemExit"),
        (exit_async, "SystemExit: 3"),
    ],
)
async def test_every_exception_becomes_call_failed(function, words):
    calls = IsolatedCalls()
    with pytest.raises(CallFailed, match=words):
        await calls.call(function, timeout=30)
    assert await calls.call(add_async, [1], {"b": 2}, timeout=30) == 3


async def test_a_keyword_may_have_any_name():
    names = ("timeout", "function", "args", "kwargs", "self", "tool")

    def given(**kwargs):
        return sorted(kwargs)

    assert await IsolatedCalls().call(given, [], dict.fromkeys(names, 1), timeout=30) == sorted(names)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
async def test_a_background_task_that_exits_does_not_stop_the_calls(error):
    ended = threading.Event()

    async def fail():
        ended.set()
        raise error

    async def start():
        start.task = asyncio.create_task(fail())

    async def outcome():
        return type(start.task.exception())

    calls = IsolatedCalls()
    await calls.call(start, timeout=30)
    assert await asyncio.to_thread(ended.wait, 60)
    assert await calls.call(outcome, timeout=30) is error
    assert await calls.call(add_async, [1], {"b": 2}, timeout=30) == 3


HANGING = """
import asyncio, time
from verl.tools.utils.isolation import CallTimeout, IsolatedCalls
def hang(): time.sleep(600)
async def in_thread(): await asyncio.to_thread(hang)
async def block(): hang()
async def main():
    calls = IsolatedCalls()
    for function in (hang, in_thread, block):
        try:
            await calls.call(function, timeout=0.05)
        except CallTimeout:
            print("timeout")
asyncio.run(main())
"""


def test_hanging_functions_do_not_keep_the_process_from_exiting():
    done = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n")[:3] == ["timeout"] * 3 and done.returncode == 0, done.stderr
