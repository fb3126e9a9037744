"""The end of a process: Ctrl-C before the run, and threads of other code, which must not keep the process alive."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

EXIT_SECONDS = 10.0
STOPPED = "verl: stopped by Ctrl-C\n"


def end_on_interrupt() -> None:
    """Until `restore_interrupt`, let Ctrl-C end the process at once with one line and status 130.

    Imports take seconds, and KeyboardInterrupt would end them with a traceback or as another exception. Has no effect
    where Ctrl-C is ignored or handled already, and outside the main thread.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler and _in_main_thread():
        signal.signal(signal.SIGINT, _end)


def restore_interrupt() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, so that what has been started can be stopped."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _end(number: int, frame: FrameType | None) -> None:
    # Not sys.stderr: the interrupt may have come while its lock was held.
    os.write(2, STOPPED.encode())
    os._exit(128 + number)


def limit_exit(status: int, seconds: float = EXIT_SECONDS) -> None:
    """End the process with `status` if it still runs `seconds` after the beginning of its exit.

    Python joins all threads that are no daemons, such as those of a thread pool in a tool or a tracker.
    """

    exiting = threading.Event()
    # Runs before the joins of thread pools, which `concurrent.futures` registers in the same way. atexit runs after all
    # joins.
    threading._register_atexit(exiting.set)  # type: ignore[attr-defined]

    def end() -> None:
        exiting.wait()
        time.sleep(seconds)
        own = (threading.main_thread(), threading.current_thread())
        names = [thread.name for thread in threading.enumerate() if thread not in own and not thread.daemon]
        held = f"threads that did not end: {', '.join(names)}" if names else "exit handlers that did not return"
        sys.stderr.write(f"verl: the process ends after {seconds:g} s without {held}\n")
        sys.stderr.flush()
        os._exit(status)

    threading.Thread(target=end, name="verl-exit", daemon=True).start()
