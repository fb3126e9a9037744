"""Tests of concurrent awaits: results in order, the first error, and the fate of the other calls."""

import asyncio

import pytest

from verl.utils.asyncio_utils import cancel_and_wait, gather_all, gather_or_cancel, unless_failed


class Call:
    """Ends with `result` when `go` is set; records a cancellation and needs some turns of the loop for it."""

    def __init__(self, result=None, error=None):
        self.result, self.error, self.go, self.ended = result, error, asyncio.Event(), None

    async def run(self):
        try:
            await self.go.wait()
            if self.error is not None:
                raise self.error
            self.ended = "returned"
            return self.result
        except asyncio.CancelledError:
            for _ in range(3):
                await asyncio.sleep(0)
            self.ended = "cancelled"
            raise


async def test_gather_or_cancel_returns_results_in_order_of_the_calls():
    calls = [Call(result) for result in "abc"]
    gathering = asyncio.ensure_future(gather_or_cancel(*(call.run() for call in calls)))
    for call in reversed(calls):
        call.go.set()
        await asyncio.sleep(0)
    assert await gathering == ("a", "b", "c")


@pytest.mark.parametrize("wait", [False, True])
async def test_gather_or_cancel_raises_the_first_error_and_cancels_the_other_calls(wait):
    failing, waiting = Call(error=ValueError("first")), Call()
    failing.go.set()
    with pytest.raises(ValueError, match="first"):
        await gather_or_cancel(failing.run(), waiting.run(), wait_for_cancelled=wait)
    assert waiting.ended == ("cancelled" if wait else None)
    for _ in range(10):
        await asyncio.sleep(0)
    assert waiting.ended == "cancelled"


async def test_cancelling_gather_or_cancel_cancels_its_calls():
    calls = [Call(), Call()]
    gathering = asyncio.ensure_future(gather_or_cancel(*(call.run() for call in calls), wait_for_cancelled=True))
    for _ in range(2):  # one turn for the gathering, one for its calls
        await asyncio.sleep(0)
    gathering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gathering
    assert [call.ended for call in calls] == ["cancelled", "cancelled"]


async def test_gather_all_lets_every_call_end_before_it_raises_the_first_error():
    calls = [Call("a"), Call(error=ValueError("second")), Call(error=KeyError("third"))]
    gathering = asyncio.ensure_future(gather_all(*(call.run() for call in calls)))
    for call in reversed(calls):
        assert not gathering.done()
        call.go.set()
        await asyncio.sleep(0)
    with pytest.raises(ValueError, match="second"):
        await gathering
    assert calls[0].ended == "returned"
    assert await gather_all() == []


async def test_cancel_and_wait_returns_when_all_tasks_have_ended():
    calls = [Call(), Call()]
    tasks = [asyncio.ensure_future(call.run()) for call in calls]
    await asyncio.sleep(0)
    await cancel_and_wait(tasks)
    assert [call.ended for call in calls] == ["cancelled", "cancelled"]


async def test_unless_failed_returns_the_result_and_ends_its_guards():
    main, guard = Call("result"), Call()
    main.go.set()
    assert await unless_failed(main.run(), guard.run()) == "result"
    assert guard.ended == "cancelled"


async def test_unless_failed_raises_the_error_of_a_guard_and_cancels_the_main_call():
    main, guard, other = Call(), Call(error=KeyError("guard")), Call()
    guard.go.set()
    with pytest.raises(KeyError, match="guard"):
        await unless_failed(main.run(), guard.run(), other.run())
    assert (main.ended, other.ended) == ("cancelled", "cancelled")


async def test_unless_failed_raises_the_error_of_the_main_call():
    main = Call(error=ValueError("main"))
    main.go.set()
    with pytest.raises(ValueError, match="main"):
        await unless_failed(main.run(), Call().run())


async def test_a_main_call_that_ignores_its_cancellation_does_not_hide_the_error():
    async def stubborn():
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if released.is_set():
                    raise

    released = asyncio.Event()
    guard = Call(error=KeyError("guard"))
    guard.go.set()
    main = asyncio.ensure_future(stubborn())
    with pytest.raises(KeyError, match="guard"):
        await unless_failed(main, guard.run(), patience=0.01)
    assert not main.done()
    released.set()
    main.cancel()
