"""Has an engine's processes sleep while they wait for one another, where the trainer shares their cores."""

from __future__ import annotations

import functools
from typing import Any


def sleep_when_idle() -> None:
    """Queues between an engine and its workers, made from now on, wait for a message without polling for it.

    vLLM polls for a second after each message, in every worker and in the engine itself: seconds of processor time that
    a trainer on the same cores, or the model's forward pass, goes without. May be called again.
    """
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    start = SpinCondition.__init__
    if hasattr(start, "__wrapped__"):
        return

    @functools.wraps(start)
    def without_polling(self: SpinCondition, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        # No message is lost: a writer notifies after each one, and the socket keeps the last notification.
        self.busy_loop_s = 0.0

    SpinCondition.__init__ = without_polling
