"""An earlier name of the command line of `verl.trainer.main_ppo` in upstream verl.

python3 -m verl.trainer.main_ppo_sync key=value ...
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take seconds
    from verl.utils.process_exit import end_on_interrupt

    end_on_interrupt()

from verl.trainer.main_ppo import main

if __name__ == "__main__":
    main()
