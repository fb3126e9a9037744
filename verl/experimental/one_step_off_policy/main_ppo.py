"""Command line of a run with `trainer.rollout_lag=1`; see docs/async_training.md.

python3 -m verl.experimental.one_step_off_policy.main_ppo key=value ...
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take seconds
    from verl.utils.process_exit import end_on_interrupt

    end_on_interrupt()

from verl.config.entry_points import ONE_STEP_OFF
from verl.trainer.main_ppo import main

if __name__ == "__main__":
    main(entry=ONE_STEP_OFF)
