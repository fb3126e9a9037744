"""Device profiles of the steps in `global_profiler.steps`, on trainer ranks and replicas."""

from __future__ import annotations

import logging
from collections.abc import Collection

from verl.config import PPOConfig
from verl.config.profiles import profiled_steps, profiles_rollout, trainer_profiles
from verl.trainer.ppo.processes import Processes
from verl.utils.asyncio_utils import gather_or_cancel
from verl.workers.rollout.types import ReplicaUnavailable
from verl.workers.train_worker import TrainWorker

logger = logging.getLogger(__name__)


class StepProfiles:
    """Begins and ends the profiles of a run.

    Args:
        config: a checked config.
        processes: the trainer ranks and replicas.
    """

    def __init__(self, config: PPOConfig, processes: Processes):
        self._processes = processes
        self._steps = profiled_steps(config)
        self._joined = config.global_profiler.profile_continuous_steps
        self._trainer, self._rollout = trainer_profiles(config) is not None, profiles_rollout(config)
        self._last: int | None = None

    async def begin(self, step: int, last_step: int) -> None:
        """Begin the profile that starts with `step`, if any.

        Args:
            last_step: last step of the run.
        """
        if self._last is not None or step not in self._steps:
            return
        self._last = last_profiled(self._steps, step, last_step) if self._joined else step
        if self._trainer:
            await self._processes.trainers.all(TrainWorker.start_profile, step, self._last)
        if self._rollout:
            await gather_or_cancel(*(replica.start_profile(step) for replica in self._processes.replicas.alive))

    async def end(self, step: int) -> None:
        """End the profile whose last step is `step`, if any."""
        if step != self._last:
            return
        self._last = None
        if self._trainer:
            await self._processes.trainers.all(TrainWorker.stop_profile)
        for replica in self._processes.replicas.alive if self._rollout else ():
            try:
                await replica.stop_profile()
            except ReplicaUnavailable as error:
                logger.warning("replica %d has no profile of step %d: %s", replica.rank, step, error)


def last_profiled(steps: Collection[int], first: int, last_step: int) -> int:
    """Return the last of the profiled steps that follow `first` without a gap, up to the last step of the run."""
    while first < last_step and first + 1 in steps:
        first += 1
    return first
