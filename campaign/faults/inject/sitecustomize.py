"""Faults inside the processes of a run: Python imports this module at the start of each of them.

It wraps the functions in `PLACES` once their modules are imported. A file `NAME.armed` in the folder that the variable
below names, with an action in JSON, is the order to strike at the place NAME: the process that gets there first renames
the file to `NAME.struck`, so that each order is carried out once.
"""

import asyncio
import functools
import importlib.util
import inspect
import json
import os
import sys
import time
from importlib.abc import Loader, MetaPathFinder
from pathlib import Path

FOLDER = "VERL_CAMPAIGN_FOLDER"

# Module -> function -> place.
PLACES = {
    "vllm.v1.worker.gpu_model_runner": {
        "GPUModelRunner.load_model": "engine.start",
        "GPUModelRunner.execute_model": "engine.generate",
    },
    "verl.workers.rollout.vllm_rollout.worker_extension": {
        "WeightUpdateExtension.verl_begin_update": "engine.begin_update",
        "WeightUpdateExtension.verl_load_bucket": "engine.load_bucket",
        "WeightUpdateExtension.verl_finish_update": "engine.finish_update",
    },
    "verl.workers.weight_sync.receiver": {
        "_FullUpdate.load": "bucket.full",
        "_DeltaUpdate.load": "bucket.delta",
    },
    "verl.workers.rollout.vllm_rollout.vllm_async_server": {
        "vLLMHttpServer.start": "replica.start",
        "vLLMHttpServer.submit_requests": "replica.generate",
        "vLLMHttpServer.begin_update": "replica.begin_update",
        "vLLMHttpServer.load_bucket": "replica.load_bucket",
        "vLLMHttpServer.finish_update": "replica.finish_update",
    },
    "verl.workers.train_worker": {
        "TrainWorker.setup": "rank.start",
        "TrainWorker.compute_log_prob": "rank.log_probs",
        "TrainWorker.update_actor": "rank.update",
        "TrainWorker.begin_export": "rank.begin_export",
        "TrainWorker.next_bucket": "rank.next_bucket",
        "TrainWorker.finish_export": "rank.finish_export",
        "TrainWorker.save_checkpoint": "rank.save",
        "TrainWorker.load_checkpoint": "rank.load",
    },
    "torch.distributed.checkpoint.filesystem": {"_write_item": "rank.write"},
    "verl.workers.reward.worker": {"_load": "reward.start", "score_one": "reward.score"},
    "verl.trainer.ppo.ray_trainer": {
        "RayPPOTrainer.local_update": "driver.train",
        "RayPPOTrainer.validate": "driver.validate",
        "RayPPOTrainer.finish_step": "driver.finish_step",
    },
    "verl.trainer.ppo.run_state": {"save_run": "driver.save"},
    "verl.trainer.ppo.checkpoint": {
        "save_driver_state": "driver.state",
        "_flush": "driver.flush",
        "CheckpointStore._publish": "driver.publish",
    },
}


def order(place):
    """The order for a place, which this process then has to carry out; None if there is none."""
    armed = Path(os.environ[FOLDER], f"{place}.armed")
    if not armed.exists():
        return None
    struck = armed.with_suffix(".struck")
    try:
        armed.rename(struck)
    except FileNotFoundError:  # another process was faster
        return None
    action = json.loads(struck.read_text())
    struck.with_suffix(".pid").write_text(str(os.getpid()))
    return action


def strike(place, action):
    """Carry out an action that does not depend on the arguments of the function."""
    kind, value = action["kind"], action.get("value")
    if kind == "signal":
        os.kill(os.getpid(), value)
        time.sleep(0.05)  # a stop takes effect here
    elif kind == "errno":
        raise OSError(value, os.strerror(value), f"struck at {place}")
    elif kind == "memory":
        raise MemoryError(f"struck at {place}")
    elif kind == "exception":
        raise RuntimeError(f"struck at {place}")


def with_bucket(function, kind):
    """A function `load(self, memory, bucket)` for one call that damages, drops or duplicates the bucket."""

    def load(self, memory, bucket):
        if kind == "drop":
            return {"unused": [], "dtypes": {}}
        if kind == "duplicate":
            function(self, memory, bucket)
        elif kind == "damage" and bucket["nbytes"]:
            memory[bucket["nbytes"] // 2] ^= 0xFF
        return function(self, memory, bucket)

    return load


def wrapped(function, place):
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def call(*arguments, **keywords):
            if (action := order(place)) is not None:
                if action["kind"] == "delay":
                    await asyncio.sleep(action["value"])
                strike(place, action)
            return await function(*arguments, **keywords)

        return call

    @functools.wraps(function)
    def call(*arguments, **keywords):
        action = order(place)
        if action is None:
            return function(*arguments, **keywords)
        if action["kind"] == "delay":
            time.sleep(action["value"])
        strike(place, action)
        return (with_bucket(function, action["kind"]) if place.startswith("bucket.") else function)(
            *arguments, **keywords
        )

    return call


class WrappingLoader(Loader):
    """Executes a module as its own loader would, then wraps its functions in `PLACES`."""

    def __init__(self, loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        for qualified, place in PLACES[module.__name__].items():
            *owners, name = qualified.split(".")
            owner = functools.reduce(getattr, owners, module)
            setattr(owner, name, wrapped(getattr(owner, name), place))

    def __getattr__(self, name):  # `get_code` and others
        return getattr(self.loader, name)


class Injector(MetaPathFinder):
    """Finds the modules of `PLACES` as Python would, for `WrappingLoader`."""

    def __init__(self):
        self.searching = set()

    def find_spec(self, name, path=None, target=None):
        if name not in PLACES or name in self.searching:
            return None
        self.searching.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching.discard(name)
        if spec is not None and spec.loader is not None:
            spec.loader = WrappingLoader(spec.loader)
        return spec


if os.environ.get(FOLDER):
    sys.meta_path.insert(0, Injector())
