"""The faults of `make campaign`, and what has to follow each of them.

A fault comes from outside (a signal to a process of the run at a random moment) or from inside (an action at a place of
the code, which `inject/sitecustomize.py` carries out).
"""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SECONDS = 5  # of a short stop
RESTART = "is started again"

# Words in the title of each kind of process. A replica has a process of Ray, and below it that of vLLM's engine.
TITLES = {
    "engine": "VLLM::EngineCore",
    "replica": "ray::vLLM",
    "rank": "ray::TrainWorker",
    "reward worker": "verl.workers.reward.worker",
    "raylet": "raylet/raylet",
    "control store": "gcs_server",
}


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        target: the kind of process that gets a signal, or the place that an action strikes.
        action: `kind` and `value`, see `inject/sitecustomize.py`.
        survives: True: the run goes on; False: it ends; None: either.
        names: regular expression that the output must contain.
        status: exit status of a run that ends.
        waits: further seconds that the run may take to notice.
    """

    target: str
    action: tuple[tuple[str, Any], ...]
    survives: bool | None
    names: str | None = None
    status: int = 1
    waits: float = 0

    @property
    def inside(self) -> bool:
        """Whether the fault is at a place of the code."""
        return "." in self.target

    @property
    def process(self) -> str:
        """The kind of process that is struck; `bucket` for a bucket of a weight update."""
        return self.target.partition(".")[0]

    def __str__(self) -> str:
        action = dict(self.action)
        value = action.get("value")
        match action["kind"]:
            case "signal":
                text = signal.Signals(value).name
            case "errno":
                text = errno.errorcode[value]
            case "stop" | "delay":
                text = f"{action['kind']} of {value:g} s"
            case kind:
                text = kind
        return f"{text} {'at' if self.inside else 'to the'} {self.target}"


def _fault(target: str, kind: str, value: Any = None, **expected: Any) -> Fault:
    return Fault(target, (("kind", kind), ("value", value)), **expected)


def _survived(watch_s: float) -> Iterator[Fault]:
    for target in ("engine", "replica"):
        yield _fault(target, "signal", signal.SIGKILL.value, survives=True, names=RESTART)
        yield _fault(target, "signal", signal.SIGSTOP.value, survives=True, names=RESTART, waits=watch_s)
    yield _fault("reward worker", "signal", signal.SIGKILL.value, survives=True)
    yield _fault("reward worker", "signal", signal.SIGSTOP.value, survives=True, names="It is replaced", waits=watch_s)
    for target in ("engine", "replica", "reward worker", "rank", "driver", "raylet", "control store"):
        yield _fault(target, "stop", SECONDS, survives=True, waits=SECONDS)
    for place in ("generate", "begin_update", "load_bucket", "finish_update"):
        for process in ("engine", "replica"):
            yield _fault(f"{process}.{place}", "signal", signal.SIGKILL.value, survives=True, names=RESTART)
            yield _fault(f"{process}.{place}", "delay", 2.0, survives=True)
    yield _fault("engine.generate", "exception", survives=True, names=RESTART)
    nothing = "finishes none of its requests"
    yield _fault("engine.generate", "delay", 1e6, survives=True, names=nothing, waits=3 * watch_s)
    yield _fault("reward.score", "signal", signal.SIGKILL.value, survives=True)
    yield _fault("reward.score", "delay", 2.0, survives=True)
    for place in ("log_probs", "update", "begin_export", "next_bucket", "finish_export", "save", "write"):
        yield _fault(f"rank.{place}", "delay", 2.0, survives=True)
    for place in ("bucket.full", "bucket.delta"):
        yield _fault(place, "delay", 2.0, survives=True)
    for place in ("rank.write", "driver.state", "driver.flush", "driver.publish"):
        for number in (errno.ENOSPC, errno.EIO, errno.EROFS):
            yield _fault(place, "errno", number, survives=True, names="on_save_error=continue")


def _fatal(watch_s: float) -> Iterator[Fault]:
    kill, stop = signal.SIGKILL.value, signal.SIGSTOP.value
    yield _fault("rank", "signal", kill, survives=False, names="trainer rank|TrainWorker")
    yield _fault("rank", "signal", stop, survives=False, names="trainer rank . .* is stuck", waits=watch_s)
    yield _fault("driver", "signal", signal.SIGINT.value, survives=False, status=130)
    yield _fault("driver", "signal", signal.SIGTERM.value, survives=False, status=143)
    yield _fault("driver", "signal", kill, survives=False, status=-kill)
    yield _fault("all processes", "signal", kill, survives=False, status=-kill)
    yield _fault("all processes", "signal", signal.SIGINT.value, survives=False, status=130)
    yield _fault("raylet", "signal", kill, survives=False)
    yield _fault("control store", "signal", kill, survives=False)
    for place in ("log_probs", "update", "begin_export", "next_bucket", "finish_export", "save"):
        struck = f"struck at rank.{place}"
        yield _fault(f"rank.{place}", "signal", kill, survives=False, names="trainer rank|TrainWorker")
        yield _fault(f"rank.{place}", "exception", survives=False, names=struck)
        yield _fault(f"rank.{place}", "memory", survives=False, names=struck)
    for place in ("train", "validate", "finish_step", "save", "state", "flush", "publish"):
        yield _fault(f"driver.{place}", "signal", kill, survives=False, status=-kill)
        yield _fault(f"driver.{place}", "exception", survives=False, names=f"struck at driver.{place}")
    for place in ("begin_update", "load_bucket", "finish_update"):
        for process in ("engine", "replica"):
            yield _fault(f"{process}.{place}", "exception", survives=None, names=f"struck at {process}.{place}")
    for place in ("bucket.full", "bucket.delta"):
        yield _fault(place, "damage", survives=None, names="bytes changed after")
        yield _fault(place, "drop", survives=None, names="missing|num_chunks|num_values|were not written")
        yield _fault(place, "duplicate", survives=None, names="duplicate name|num_chunks|num_values")


def _starting() -> Iterator[Fault]:
    """Faults while the processes start."""
    kill = signal.SIGKILL.value
    for place in ("engine.start", "replica.start"):
        yield _fault(place, "signal", kill, survives=None)
        yield _fault(place, "exception", survives=None, names=f"struck at {place}")
    yield _fault("rank.start", "signal", kill, survives=False, names="trainer rank|TrainWorker")
    yield _fault("rank.start", "exception", survives=False, names="struck at rank.start")
    yield _fault("rank.load", "exception", survives=False, names="struck at rank.load")
    yield _fault("reward.start", "signal", kill, survives=None)
    yield _fault("driver", "signal", signal.SIGINT.value, survives=False, status=130)
    yield _fault("driver", "signal", signal.SIGTERM.value, survives=False, status=143)


def catalog(watch_s: float) -> tuple[list[Fault], list[Fault], list[Fault]]:
    """Return the faults that a run survives, those that end it, and those for its start.

    Args:
        watch_s: limits of the watchdog in the run, seconds.
    """
    return list(_survived(watch_s)), list(_fatal(watch_s)), list(_starting())
