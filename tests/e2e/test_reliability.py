"""Runs whose processes die or stop: they go on with the right weights, or end with the reason."""

import contextlib
import re

import psutil
import pytest

from fixtures.training import TinyRun, alive, descendants, left_in_shared_memory, orphaned_shared_memory, prompts_of

pytestmark = pytest.mark.e2e

# A library that every process of an engine imports. It sends a signal to its own process at given places of the run,
# at each of them once, whichever replica comes there first.
FAULTS = """
import functools
import os
import signal
from pathlib import Path

from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from verl.workers.rollout.vllm_rollout.worker_extension import WeightUpdateExtension

PLACES = {places}
version = 0


def here(place):
    number = PLACES.get((place, version))
    if number is None:
        return
    try:
        os.close(os.open(Path(__file__).with_name(f"{{place}}-{{version}}"), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    print(f"(EngineCore pid=1) ERROR 11-29 21:28:51 [core.py:1] RuntimeError: struck at {{place}}", flush=True)
    os.kill(os.getpid(), number)


def before(owner, name, action):
    original = getattr(owner, name)

    @functools.wraps(original)
    def changed(self, *arguments, **keywords):
        action(*arguments)
        return original(self, *arguments, **keywords)

    setattr(owner, name, changed)


def begin(number, *_):
    global version
    version = number


before(WeightUpdateExtension, "verl_begin_update", begin)
before(WeightUpdateExtension, "verl_load_bucket", lambda *_: here("load"))
before(WeightUpdateExtension, "verl_finish_update", lambda *_: here("finish"))
before(GPUModelRunner, "execute_model", lambda *_: here("generate"))
"""


def faulty(run, places):
    """Overrides of a run whose engines get signals at `places`: (place, weight version) -> number of the signal."""
    library = run.root / "faults.py"
    library.write_text(FAULTS.format(places={place: int(number) for place, number in places.items()}))
    return {"actor_rollout_ref__model__external_lib": library, "trainer__watchdog__heartbeat_s": 0.2}


@pytest.mark.parametrize(("replicas", "lag"), [(1, 1), (2, 0)])
def test_a_run_survives_the_death_of_its_engines(tmp_path, replicas, lag):
    run = TinyRun(tmp_path)
    before = orphaned_shared_memory()
    # The first one in the check of engine and trainer after the first update.
    places = {("generate", 1): 9, ("generate", 3): 9, ("load", 5): 9}
    text = run.run(
        **faulty(run, places),
        trainer__n_gpus_per_node=replicas,
        trainer__rollout_lag=lag,
        trainer__total_training_steps=8,
        trainer__rollout_data_dir=tmp_path / "dumps",
    )
    metrics = run.metrics()
    assert sorted(metrics) == list(range(1, 9))
    assert prompts_of(tmp_path / "dumps") == run.expected_prompts(8)
    for step, data in metrics.items():
        behind = data["training/versions_behind/min"], data["training/versions_behind/max"]
        assert behind == (0, 0) or (lag == 1 and step > 1 and 0 <= behind[0] <= behind[1] == 1), (step, behind)
        if behind == (0, 0):
            # The engine computes with the weights that its version names, also after a restart.
            assert data["training/rollout_probs_diff_max"] < 1e-4, step
    assert metrics[8]["reliability/restarts"] == 3
    assert text.count("is started again") == 3
    assert text.count("its engine died: RuntimeError: struck at generate") == 2, "once, not for each request"
    assert "trying another replica" not in text and "stack trace" not in text
    assert left_in_shared_memory(before) == set()


def test_a_run_ends_with_the_first_error_of_an_engine_without_restarts_left(tmp_path):
    run = TinyRun(tmp_path)
    process = run.start(**faulty(run, {("generate", 1): 9}), actor_rollout_ref__rollout__max_restarts=0)
    run.wait_for(lambda: (tmp_path / "generate-1").exists(), process)
    family = descendants(process.pid)
    assert process.wait(120) == 1
    text = run.log.read_text()
    assert re.search(r"ReplicaFailed: replica 0 died, and was restarted 0 time.*struck at generate", text)
    assert alive(family) == []


def processes(process, words):
    """Processes below `process` with `words` in their titles."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if words in " ".join(child.cmdline()):
                found.append(child)
    return found


def test_stopped_processes_are_noticed_and_named(tmp_path):
    """A reward worker, an engine and a trainer rank are stopped (SIGSTOP), one after another."""
    run = TinyRun(tmp_path)
    watchdog = {f"trainer__watchdog__{name}_timeout_s": 15 for name in ("reward", "engine", "trainer")}
    process = run.start(trainer__total_training_steps=10000, trainer__watchdog__heartbeat_s=0.2, **watchdog)

    def steps():
        return len(run.metrics()) if (run.out / "metrics.jsonl").exists() else 0

    def goes_on():
        reached = steps()
        run.wait_for(lambda: steps() > reached + 2, process)

    def says(pattern):
        return re.search(pattern, run.log.read_text())

    run.wait_for(lambda: steps() >= 2, process)
    for words, role, sign in (
        ("verl.workers.reward.worker", "reward worker 0", "It is replaced"),
        ("VLLM::EngineCore", r"replica 0 \(\w+\)", "replica 0 serves version"),
    ):
        (victim,) = processes(process, words)
        victim.suspend()
        named = rf"{role} \(pid {victim.pid} on .*\) is stuck: .*_timeout_s=15.*it is stopped by a signal"
        run.wait_for(lambda named=named, sign=sign: says(named) and says(sign), process)
        goes_on()

    family = descendants(process.pid)
    (victim,) = processes(process, "ray::TrainWorker")
    victim.suspend()
    assert process.wait(150) == 1
    assert says(rf"WatchdogError: trainer rank 0 \(pid {victim.pid} on .*\) is stuck: .*it is stopped by a signal")
    stacks = {path.name.partition(".")[0]: path.read_text() for path in (run.out / "stacks").glob("*.txt")}
    assert "ray_trainer.py" in stacks["driver"] and "_serve_sync" in stacks["reward_worker_0"]
    assert any(role.startswith("replica_0_(") for role in stacks)
    assert alive(family) == []
