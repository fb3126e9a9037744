"""Command line of a fully asynchronous run; see docs/fully_async.md.

python3 -m verl.experimental.fully_async_policy.fully_async_main key=value ...
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take seconds
    from verl.utils.process_exit import end_on_interrupt

    end_on_interrupt()

from verl.config.entry_points import FULLY_ASYNC
from verl.trainer.main_ppo import main

if __name__ == "__main__":
    main(entry=FULLY_ASYNC)
