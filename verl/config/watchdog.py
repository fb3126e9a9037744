"""`trainer.watchdog`: how dead, silent and hanging processes are noticed."""

from __future__ import annotations

from dataclasses import dataclass

from verl.config.conditions import when
from verl.config.schema import ConfigSection, key

_ENABLED = when("trainer.watchdog.enable")


@dataclass
class WatchdogConfig(ConfigSection):
    """Limits of the silence of a process. They are independent of the length of a step."""

    enable: bool = key(
        True, "watch the processes of the run; False: only a request or a call to a process shows that it is dead"
    )
    heartbeat_s: float = key(
        2.0, "interval in which every process is asked for a sign of life", unit="seconds", above=0, only_with=_ENABLED
    )
    engine_timeout_s: float = key(
        60.0,
        "silence after which a process of an engine is stuck; the replica is restarted (rollout.max_restarts)",
        unit="seconds",
        above=0,
        only_with=_ENABLED,
    )
    generation_timeout_s: float = key(
        7200.0,
        "time in which a replica that has requests finishes one of them; else it is stuck, and is restarted",
        unit="seconds",
        above=0,
        only_with=_ENABLED,
    )
    trainer_timeout_s: float = key(
        300.0,
        "silence after which a trainer rank is stuck; the run ends",
        unit="seconds",
        above=0,
        only_with=_ENABLED,
    )
    reward_timeout_s: float = key(
        60.0,
        "silence after which a reward worker that is stopped (SIGSTOP) is replaced; reward.timeout limits its samples",
        unit="seconds",
        above=0,
        only_with=_ENABLED,
    )
    phase_timeout_s: float = key(
        14400.0,
        "time for one call to the trainer ranks (a forward pass, an update, a checkpoint, ...); the run ends if it is "
        "exceeded",
        unit="seconds",
        above=0,
        only_with=_ENABLED,
    )
