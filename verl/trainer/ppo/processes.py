"""Launch of the processes of a run: trainer ranks and replicas, on the nodes that `verl.single_controller` assigns."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path

from verl.config import CriticConfig, PPOConfig
from verl.config.engine_pools import EnginePool, engine_pools
from verl.config.profiles import rollout_profiles, trainer_profiles
from verl.config.rollout_correction import Correction
from verl.preflight import Plan
from verl.single_controller.placement import Placement, place_processes, replica_count, shared_devices
from verl.single_controller.worker_group import WorkerGroup
from verl.timeline.spans import current_timeline
from verl.trainer.ppo.fixed_engines import fixed_replicas
from verl.trainer.ppo.prometheus_file import PrometheusFile
from verl.trainer.ppo.shared_files import check_shared_directory, check_visible_paths, input_paths
from verl.utils.asyncio_utils import gather_or_cancel
from verl.utils.heartbeat import heartbeat_environment
from verl.utils.host import cpu_cores, cpu_environment
from verl.utils.vllm.npu_settings import hccl_environment
from verl.workers.rollout.replica import ReplicaSet, vLLMReplica
from verl.workers.rollout.types import ReplicaReport
from verl.workers.rollout.vllm_rollout.engine_args import engine_environment
from verl.workers.train_worker import TrainWorker
from verl.workers.weight_sync.transports.base import Node
from verl.workers.weight_sync.transports.nodes import current_node_id, is_multi_node, node_of

logger = logging.getLogger(__name__)


class Processes:
    """Trainer ranks and replicas. Call `place`, then `start`; call `stop` in any case.

    Args:
        config, plan: checked together; the plan holds the chosen device and dtypes.
        with_ref: load the reference model too.
        critic: the completed `critic` section; None without a critic.
        bypass: the rollout correction of bypass mode; None otherwise.

    Attributes:
        nodes: the node of each trainer rank, after `start`.
    """

    def __init__(
        self,
        config: PPOConfig,
        plan: Plan,
        *,
        with_ref: bool,
        critic: CriticConfig | None,
        bypass: Correction | None,
    ):
        self._config, self._plan = config, plan
        self._with_ref, self._critic, self._bypass = with_ref, critic, bypass
        self._placement: Placement | None = None
        self._replicas: ReplicaSet | None = None
        self._fixed: dict[str, ReplicaSet] = {}
        self._trainers: WorkerGroup[TrainWorker] | None = None
        prometheus = config.actor_rollout_ref.rollout.prometheus
        self._prometheus = PrometheusFile(prometheus) if prometheus.enable else None
        self.nodes: list[Node] = []

    @property
    def trainers(self) -> WorkerGroup[TrainWorker]:
        """The trainer ranks."""
        assert self._trainers is not None, "call start() first"
        return self._trainers

    @property
    def replicas(self) -> ReplicaSet:
        """The replicas."""
        assert self._replicas is not None, "call place() first"
        return self._replicas

    def engines(self, pool: EnginePool) -> ReplicaSet:
        """Return the engines of a model with fixed weights."""
        return self._fixed[pool.section]

    def place(self) -> None:
        """Reserve devices and create the replica objects; starts no process.

        Raises:
            RuntimeError: the cluster has fewer devices or nodes than the config asks for.
        """
        self._placement = place_processes(self._config, self._plan.device)
        self._replicas = self._make_replicas(self._placement)
        self._fixed = {
            pool.section: fixed_replicas(pool, self._placement.pools[pool.section], self._plan.device)
            for pool in engine_pools(self._config)
        }

    async def start(self, total_training_steps: int, local_updates: int = 1) -> None:
        """Start trainer ranks and replicas at the same time.

        Args:
            total_training_steps: steps of the run.
            local_updates: updates of the trainer in a step; the learning-rate schedule advances with each of them.

        Raises:
            FileNotFoundError: a rank on another node does not see a file or directory that it needs.
        """
        assert self._placement is not None, "call place() first"
        self._trainers = self._make_trainers(self._placement, total_training_steps, local_updates)
        if self._plan.device != "cpu" or is_multi_node():
            # Before the replicas start: they use the devices of their ranks. A file missing on a node shows here too.
            await self._locate_trainers()
        logger.info("starting %d trainer rank(s) and %d replica(s)", len(self.trainers), len(self.replicas.replicas))
        fixed = (engines.start() for engines in self._fixed.values())
        await gather_or_cancel(self.replicas.start(), self._start_trainers(), *fixed)

    async def stop(self) -> None:
        """End every process that was started, and release the devices."""
        # The stack runs every callback even if one fails, the last one first.
        async with AsyncExitStack() as stack:
            if self._placement is not None:
                stack.callback(self._placement.release)
            if self._replicas is not None:
                stack.push_async_callback(self._replicas.stop)
            for engines in self._fixed.values():
                stack.push_async_callback(engines.stop)
            if self._trainers is not None:
                stack.callback(self._trainers.stop)

    async def check_visible(self, paths: Mapping[str, str | Path]) -> None:
        """Check that every rank sees files of this host, if any rank runs on another node.

        Args:
            paths: files or directories by config key.

        Raises:
            FileNotFoundError: a rank does not see a path.
        """
        if addresses := self._rank_addresses():
            await check_visible_paths(paths, self.trainers, addresses)

    def _make_replicas(self, placement: Placement) -> ReplicaSet:
        config, count = self._config, replica_count(self._config)
        rollout = config.actor_rollout_ref.rollout
        # Replicas with their own devices never have to release memory for the trainer.
        free_cache_engine = rollout.free_cache_engine and not rollout.nnodes
        arguments = {
            "rollout": dataclasses.replace(rollout, free_cache_engine=free_cache_engine),
            "model": config.actor_rollout_ref.model,
            "device": self._plan.device,
            "dtype": self._plan.rollout_dtype,
            "prompt_length": config.data.max_prompt_length,
            "response_length": config.data.max_response_length,
            "seed": config.trainer.seed,
            "profiles": rollout_profiles(config, count),
            "timeline": current_timeline(),
        }
        environment = engine_environment(
            device=self._plan.device,
            threads=max(1, cpu_cores() // math.ceil(count / (rollout.nnodes or config.trainer.nnodes))),
            tensor_parallel_size=rollout.tensor_model_parallel_size,
            external_lib=config.actor_rollout_ref.model.external_lib,
        )
        replicas = [
            vLLMReplica(rank, arguments, options, environment | heartbeat_environment(f"replica {rank}"))
            for rank, options in enumerate(placement.replicas)
        ]
        return ReplicaSet(replicas, on_start=self._on_replica_start)

    def _on_replica_start(self, rank: int, report: ReplicaReport) -> None:
        logger.info("replica %d is up after %.1f s (pid %d)", rank, report["seconds"], report["pid"])
        if report["http"] is not None and self._prometheus is not None:
            self._prometheus.add(rank, report["http"])
        if report["http"] is None or report["api_key"] is None:
            return
        # The key is a secret: it goes into a file that only this user can read, never into a log.
        path = Path(self._config.trainer.default_local_dir) / f"http_replica_{rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump({"base_url": report["http"] + "/v1", "api_key": report["api_key"]}, file)
        logger.info("replica %d serves %s/v1; its key is in %s", rank, report["http"], path)

    def _make_trainers(
        self, placement: Placement, total_training_steps: int, local_updates: int
    ) -> WorkerGroup[TrainWorker]:
        environment = {}
        if self._plan.device == "cpu":
            environment = cpu_environment(max(1, cpu_cores() // self._config.trainer.n_gpus_per_node))
        elif self._plan.device == "npu":
            environment = hccl_environment(os.environ)
        return WorkerGroup(
            TrainWorker,
            [
                {**option, "runtime_env": {"env_vars": environment | heartbeat_environment(f"trainer rank {rank}")}}
                for rank, option in enumerate(placement.trainers)
            ],
            world_size=len(placement.trainers),
            config=self._config.actor_rollout_ref,
            device=self._plan.device,
            total_training_steps=total_training_steps * local_updates,
            max_model_len=self._config.max_model_len,
            with_ref=self._with_ref,
            critic=self._critic,
            critic_warmup=self._config.trainer.critic_warmup * local_updates,
            bypass=self._bypass,
            distillation=self._config.distillation.distillation_loss if self._config.distillation.enabled else None,
            seed=self._config.trainer.seed,
            rollout_dtype=self._plan.rollout_dtype,
            profiles=trainer_profiles(self._config),
            timeline=current_timeline(),
        )

    async def _start_trainers(self) -> None:
        started = time.perf_counter()
        if not self.nodes:
            await self._locate_trainers()
        addresses = [node.address if self._config.trainer.nnodes > 1 else "127.0.0.1" for node in self.nodes]
        port = await self.trainers.rank(0, TrainWorker.reserve_port, addresses[0])
        await self.trainers.each(TrainWorker.setup, [(addresses[0], port, address) for address in addresses])
        logger.info("%d trainer rank(s) are up after %.1f s", len(self.trainers), time.perf_counter() - started)

    async def _locate_trainers(self) -> None:
        """Find each rank's node and device; check that ranks on other nodes see the same files as the driver."""
        trainer = self._config.trainer
        self.nodes = await self.trainers.run(node_of, self._plan.device)
        rank_devices = [node.device for node in self.nodes]
        for replica in self.replicas.replicas:
            replica.environment |= shared_devices(self._config, self._plan.device, rank_devices, replica.rank)
        if addresses := self._rank_addresses():
            await check_visible_paths(input_paths(self._config), self.trainers, addresses)
            if trainer.save_freq > 0:
                await check_shared_directory(trainer.default_local_dir, self.trainers, addresses)

    def _rank_addresses(self) -> list[str]:
        """Return the address of each rank's node; empty if all ranks run on the driver's node."""
        driver_node = current_node_id()
        remote = any(node.id != driver_node for node in self.nodes)
        return [node.address for node in self.nodes] if remote else []
