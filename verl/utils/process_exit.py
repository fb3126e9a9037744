"""The end of a process: threads of other packages, and of the user's code, must not keep it alive."""

from __future__ import annotations

import os
import sys
import threading
import time

EXIT_SECONDS = 10.0


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
