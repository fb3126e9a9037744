"""Makes idle processes of an engine block instead of polling, because the trainer shares their cores."""

from __future__ import annotations

import functools
from typing import Any


def sleep_when_idle() -> None:
    """Make new queues between an engine and its workers wait for messages without polling; may be called again.

    vLLM polls for one second after each message, in every worker and in the engine. This takes processor time from a
    trainer on the same cores and from the model's forward pass.
    """
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    start = SpinCondition.__init__
    if hasattr(start, "__wrapped__"):
        return

    @functools.wraps(start)
    def without_polling(self: SpinCondition, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        # No message is lost: a writer notifies after each message, and the socket keeps the last notification.
        self.busy_loop_s = 0.0

    SpinCondition.__init__ = without_polling  # type: ignore[method-assign]  # a patch of vLLM
