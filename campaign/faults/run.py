"""A run that gets faults, ends, resumes, gets further faults ..., and at the end has to be as if undisturbed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from campaign.faults.catalog import TITLES, Fault
from fixtures.training import TinyRun, alive, descendants, orphaned_shared_memory, prompts_of

WATCH_S = 15.0  # limits of the watchdog in these runs
START_S = 240.0  # longest start of a run
GOES_ON_S = 90.0  # longest time from a fault to the third step after it, without the time to notice it
REACHED_S = 30.0  # longest time until a place is reached
LAST = 100_000  # steps of a run that a fault is to end
INJECT = Path(__file__).parent / "inject"


class Violated(Exception):
    """The run does not do what has to follow a fault."""


@dataclass(frozen=True)
class Settings:
    """What differs between the runs of the campaign."""

    ranks: int
    replicas: int
    lag: int
    delta: str
    quantization: str | None

    @classmethod
    def draw(cls, rng: random.Random) -> Settings:
        """Choose settings at random."""
        ranks, replicas = rng.choice([(1, 1), (1, 2), (2, 2)])
        return cls(
            ranks=ranks,
            replicas=replicas,
            lag=rng.randrange(2),
            delta=rng.choice(["off", "on"]),
            quantization=rng.choice([None, None, "ascend"]),
        )

    def overrides(self) -> dict[str, Any]:
        """Return the overrides of `TinyRun`."""
        rollout = "actor_rollout_ref__rollout"
        keys: dict[str, Any] = {
            "trainer__n_gpus_per_node": self.ranks,
            "trainer__rollout_lag": self.lag,
            "trainer__on_save_error": "continue",
            f"{rollout}__checkpoint_engine__delta": self.delta,
            f"{rollout}__max_restarts": 1000,
        }
        if self.replicas != self.ranks:
            keys |= {f"{rollout}__nnodes": 1, f"{rollout}__n_gpus_per_node": self.replicas}
        if self.quantization is not None:
            keys[f"{rollout}__quantization"] = self.quantization
        return keys


@dataclass
class Row:
    """The result of a fault: `survived`, `ended` (and resumed later) or `not reached`, and what was wrong."""

    fault: str
    target: str
    step: int
    seconds: float = 0.0
    outcome: str = ""
    violations: list[str] = field(default_factory=list)


class FaultedRun:
    """One run directory, and the process that trains in it at present.

    Args:
        root: an empty directory.
        settings: of the run.
        rng: chooses moments and victims.
    """

    def __init__(self, root: Path, settings: Settings, rng: random.Random):
        self.settings, self.rng = settings, rng
        self.run = TinyRun(root)
        self.dumps, self.orders = root / "dumps", root / "orders"
        self.orders.mkdir()
        self.process: Any = None
        self.family: set[tuple[int, float]] = set()
        self.logs: list[str] = []
        self.shared_before = orphaned_shared_memory()

    # ---- the process ----

    def start(self, last_step: int = LAST) -> None:
        """Start the command, which resumes from the last checkpoint if there is one."""
        environment = {"PYTHONPATH": str(INJECT), "VERL_CAMPAIGN_FOLDER": str(self.orders)}
        if os.environ.get("PYTHONPATH"):
            environment["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
        self.family = set()
        self.process = self.run.start(
            **self.settings.overrides(),
            environment=environment,
            trainer__total_training_steps=last_step,
            trainer__save_freq=1,
            trainer__test_freq=5,
            trainer__max_actor_ckpt_to_keep=2,
            trainer__rollout_data_dir=self.dumps,
            trainer__watchdog__heartbeat_s=0.2,
            **{f"trainer__watchdog__{name}_timeout_s": WATCH_S for name in ("reward", "engine", "trainer")},
            trainer__watchdog__phase_timeout_s=2 * WATCH_S,
            trainer__watchdog__generation_timeout_s=2 * WATCH_S,
        )

    def text(self) -> str:
        """The output of the present process."""
        return self.run.log.read_text(errors="replace")

    def observe(self) -> bool:
        """Note the processes of the run; return whether it still runs."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.family |= descendants(self.process.pid)
        return self.process.poll() is None

    def wait(self, done: Callable[[], bool], seconds: float) -> bool:
        """Wait until `done()`, or the end of the process, or the end of the time; return `done()`."""
        deadline = time.monotonic() + seconds
        while self.observe() and time.monotonic() < deadline:
            if done():
                return True
            time.sleep(0.1)
        return done()

    def wait_for_steps(self, count: int, seconds: float) -> None:
        """Wait for `count` further steps."""
        reached = self.run.last_step()
        if not self.wait(lambda: self.run.last_step() >= reached + count, seconds):
            state = "still runs" if self.process.poll() is None else f"ended with {self.process.returncode}"
            raise Violated(f"no {count} steps after step {reached} in {seconds:g} s; it {state}: {self.tail()}")

    def tail(self) -> str:
        """The last words of the output, on one line."""
        return " | ".join(line.strip() for line in self.text().splitlines()[-12:])[-1500:]

    def kill(self) -> None:
        """End what is left of the run."""
        if self.process is not None and self.process.poll() is None:
            self.observe()
            self.process.kill()
            self.process.wait()
        for pid, created in self.family:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if process.create_time() == created:
                    process.kill()

    # ---- faults ----

    def strike(self, fault: Fault) -> Row:
        """Strike the running process, and check what follows."""
        row, offset = Row(str(fault), fault.process, self.run.last_step()), len(self.text())
        began = time.monotonic()
        try:
            if not self.inflict(fault, REACHED_S):
                row.outcome = "not reached"
            else:
                self.follow(fault, row, offset, GOES_ON_S + fault.waits)
        except Violated as violation:
            row.violations.append(str(violation))
        row.seconds = round(time.monotonic() - began, 1)
        return row

    def strike_start(self, fault: Fault) -> Row:
        """Start with a fault in the start."""
        row = Row(f"{fault}, while the run starts", fault.process, self.run.last_step())
        began = time.monotonic()
        try:
            if fault.inside:
                self.arm(fault)
                self.start()
                reached = self.wait(lambda: not self.armed(fault), START_S)
            else:
                self.start()
                self.wait(lambda: False, self.rng.uniform(1.0, 25.0))
                reached = self.inflict(fault, REACHED_S)
            if not reached:
                row.outcome = "not reached"
            else:
                self.follow(fault, row, 0, GOES_ON_S + fault.waits + START_S)
        except Violated as violation:
            row.violations.append(str(violation))
        finally:
            self.disarm(fault)
        row.seconds = round(time.monotonic() - began, 1)
        return row

    def inflict(self, fault: Fault, seconds: float) -> bool:
        """Carry out a fault at a random moment; return False if its place was not reached."""
        self.wait(lambda: False, self.rng.uniform(0.0, 1.5))
        if self.process.poll() is not None:
            raise Violated(f"the run ended before the fault: {self.tail()}")
        if fault.inside:
            self.arm(fault)
            self.wait(lambda: not self.armed(fault), seconds)
            return not self.disarm(fault)
        action = dict(fault.action)
        victims = self.victims(fault.target)
        if not victims:
            return False
        stop = action["kind"] == "stop"
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGSTOP if stop else action["value"])
        if stop:
            time.sleep(action["value"])
            for victim in victims:
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.send_signal(signal.SIGCONT)
        return True

    def victims(self, target: str) -> list[psutil.Process]:
        """The processes that a fault strikes: one of a kind, or all of them."""
        self.observe()
        driver = psutil.Process(self.process.pid)
        if target == "driver":
            return [driver]
        below = driver.children(recursive=True)
        if target == "all processes":
            return [driver, *below]
        found = []
        for process in below:
            with contextlib.suppress(psutil.Error):
                if TITLES[target] in " ".join(process.cmdline()):
                    found.append(process)
        return [self.rng.choice(found)] if found else []

    def order(self, fault: Fault) -> Path:
        return self.orders / f"{fault.target}.armed"

    def arm(self, fault: Fault) -> None:
        order = self.order(fault)
        temporary = order.with_suffix(".new")
        temporary.write_text(json.dumps(dict(fault.action)))
        temporary.rename(order)

    def armed(self, fault: Fault) -> bool:
        return self.order(fault).exists()

    def disarm(self, fault: Fault) -> bool:
        """Take an order back; return False if it was carried out."""
        with contextlib.suppress(FileNotFoundError):
            self.order(fault).unlink()
            return True
        return False

    # ---- what has to follow ----

    def follow(self, fault: Fault, row: Row, offset: int, limit: float) -> None:
        """Check that the run goes on, or ends as it has to, and that the output after `offset` names the cause."""
        reached = self.run.last_step()
        if fault.survives is False:
            self.wait(lambda: False, limit)
        else:
            self.wait(lambda: self.run.last_step() >= reached + 3, limit)
        ended = self.process.poll() is not None
        row.outcome = "ended" if ended else "survived"
        if ended and fault.survives:
            raise Violated(f"it ended with {self.process.returncode}: {self.tail()}")
        if not ended and fault.survives is False:
            raise Violated(f"it did not end within {limit:g} s: {self.tail()}")
        if not ended and self.run.last_step() < reached + 3:
            raise Violated(f"no 3 steps after step {reached} in {limit:g} s: {self.tail()}")
        if ended:
            self.check_end(fault)
        if fault.names is not None and not re.search(fault.names, self.text()[offset:]):
            raise Violated(f"the output does not name the cause ({fault.names}): {self.tail()}")

    def check_end(self, fault: Fault) -> None:
        """Check the exit status, and that the end left nothing behind."""
        status = self.process.returncode
        if status != fault.status:
            raise Violated(f"exit status {status}, not {fault.status}: {self.tail()}")
        if fault.status in (130, 143) and "Traceback" in self.text():
            raise Violated(f"a traceback: {self.tail()}")
        self.check_left(killed=fault.status == -signal.SIGKILL)

    def check_left(self, killed: bool = False) -> None:
        """Check that no process is left, and nothing in shared memory unless the run was `killed` as a whole."""
        if left := alive(self.family, within=60):
            raise Violated(f"processes are left: {left}")
        shared = orphaned_shared_memory() - self.shared_before
        self.shared_before |= shared
        if shared and not killed:  # nobody is left to remove the semaphores of a killed run
            raise Violated(f"left in shared memory: {sorted(shared)}")

    def finish(self) -> list[str]:
        """Let the run reach its end; return everything that differs from an undisturbed run."""
        self.kill()
        try:
            last = self.run.last_step() + 3
            self.start(last)
            self.wait(lambda: False, START_S)
            if self.process.poll() != 0:
                raise Violated(f"the last part of the run ended with {self.process.poll()}: {self.tail()}")
            self.check_left()
            return self.differences(last)
        except Violated as violation:
            return [str(violation)]
        finally:
            self.kill()

    def differences(self, last: int) -> list[str]:
        """Compare the records with those of an undisturbed run."""
        problems = []
        records = [json.loads(line) for line in (self.run.out / "metrics.jsonl").read_text().splitlines()]
        steps = [record["step"] for record in records]
        if steps != list(range(1, last + 1)):
            problems.append(f"steps in the log: {steps}, not 1 to {last}")
        for record in records:
            problems += self.wrong_versions(record["step"], record["data"])
        if prompts_of(self.dumps) != self.run.expected_prompts(last):
            problems.append("the prompts of the steps are not those of an undisturbed run")
        problems += self.wrong_scores()
        if remains := [str(path.relative_to(self.run.root)) for path in self.run.root.rglob("*tmp*")]:
            problems.append(f"temporary files: {remains}")
        return problems

    def wrong_versions(self, step: int, data: dict[str, Any]) -> list[str]:
        """Check that tokens have one committed version, and that its weights are those of the trainer."""
        behind = data["training/versions_behind/min"], data["training/versions_behind/max"]
        if not 0 <= behind[0] <= behind[1] <= self.settings.lag:
            return [f"step {step}: tokens are {behind} versions behind"]
        far = data["training/rollout_probs_diff_max"]
        if behind == (0, 0) and self.settings.quantization is None and not far < 1e-4:
            return [f"step {step}: probabilities of engine and trainer differ by {far:g}"]
        return []

    def wrong_scores(self) -> list[str]:
        """Score the samples again, as the reward function does."""
        wrong = []
        for path in sorted(self.dumps.glob("*.jsonl")):
            for number, line in enumerate(path.read_text().splitlines()):
                sample = json.loads(line)
                if sample["score"] != sum(letter in sample["gts"] for letter in sample["output"]) / 8:
                    wrong.append(f"{path.name}, sample {number}: score {sample['score']}")
        return wrong[:5]
