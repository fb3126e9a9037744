"""Everything that runs during training: trainer ranks, replicas, rewards, data. The loop calls it stage by stage."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from verl.agent_loop.generation import SampleGenerator
from verl.algorithms.advantages import get_adv_estimator_fn, required_columns
from verl.algorithms.kl_in_reward import get_kl_controller
from verl.config import PPOConfig
from verl.config.roles import needs_critic, needs_ref, resolve_critic
from verl.config.rollout_correction import resolve
from verl.config.weight_updates import full_update_reason, resolve_backend
from verl.preflight import Plan
from verl.protocol import DataProto
from verl.single_controller.placement import Placement, place_processes, replica_count, shared_devices
from verl.single_controller.worker_group import WorkerGroup
from verl.trainer.ppo.batching import ACTOR_COLUMNS, CRITIC_COLUMNS, partition, split_even, split_mini_batches
from verl.trainer.ppo.checkpoint import CheckpointError, load_driver_state, save_driver_state
from verl.trainer.ppo.metrics import compute_seqlen_metrics
from verl.trainer.ppo.shared_files import check_seen, check_shared, files_of
from verl.trainer.ppo.trainer_sender import TrainerSender
from verl.trainer.rollouts.forward_passes import ForwardPasses, Pass
from verl.trainer.rollouts.partial_rollout import Position
from verl.trainer.rollouts.prompts import Place, PromptSource
from verl.trainer.rollouts.sampling import Sampling
from verl.utils.asyncio_utils import gather_or_cancel
from verl.utils.dataset.loader import build_dataloader
from verl.utils.dataset.rl_dataset import create_rl_dataset
from verl.utils.heap import freeze_heap
from verl.utils.host import cpu_cores, cpu_environment
from verl.utils.timeline import current_timeline
from verl.utils.tokenizer import hf_tokenizer
from verl.utils.vllm.npu_settings import hccl_environment
from verl.workers.actor import log_prob_limits
from verl.workers.critic import forward_limits
from verl.workers.engine.micro_batch import MicroBatching
from verl.workers.reward import RewardLoop
from verl.workers.rollout.client import LLMServerClient
from verl.workers.rollout.replica import ReplicaSet, vLLMReplica
from verl.workers.rollout.vllm_rollout.engine_args import engine_environment
from verl.workers.train_worker import TrainWorker
from verl.workers.weight_sync.transports.base import Node
from verl.workers.weight_sync.transports.create import create_transport
from verl.workers.weight_sync.transports.nodes import current_node_id, is_multi_node, node_of
from verl.workers.weight_sync.updater import PAYS_ACROSS_HOSTS, PAYS_ON_ONE_HOST, WeightUpdater

logger = logging.getLogger(__name__)


# Rows [b] of each rank.
Parts = Sequence[np.ndarray] | None

# Tensor columns of every batch when advantages are computed; `reward_baselines` is made for who names it.
ALWAYS_THERE = (
    *("prompts", "responses", "input_ids", "attention_mask", "position_ids", "response_mask", "weight_versions"),
    *("token_level_scores", "token_level_rewards", "reward_baselines"),
)


class Runtime:
    """Made from a checked config; `start` before anything else, `stop` in any case.

    Args:
        config, plan: checked together; the plan holds device and dtypes that were chosen.
    """

    def __init__(self, config: PPOConfig, plan: Plan):
        self.config, self.plan = config, plan
        self.with_ref = needs_ref(config)
        self._critic = resolve_critic(config) if needs_critic(config) else None
        self.correction = resolve(config.algorithm.rollout_correction)
        self.kl_controller = get_kl_controller(**dataclasses.asdict(config.algorithm.kl_ctrl))
        self._on_demand = self._estimator_columns()
        engine = config.actor_rollout_ref.rollout.checkpoint_engine
        backend = resolve_backend(config, plan.device)
        pays_below = PAYS_ON_ONE_HOST if backend == "naive" else PAYS_ACROSS_HOSTS
        self._updates = WeightUpdater(
            delta=full_update_reason(config.actor_rollout_ref.rollout, plan.device) is None,
            pays_below=math.inf if engine.delta == "on" else pays_below,
            check_interval=engine.delta_check_interval,
            buckets_in_flight=engine.buckets_in_flight,
        )
        self._transport = create_transport(engine, backend, plan.device)
        self._placement: Placement | None = None
        self._group: WorkerGroup[TrainWorker] | None = None
        self._nodes: list[Node] = []  # of each rank
        self._replicas: ReplicaSet | None = None
        self._rewards: RewardLoop | None = None
        self._sampling: Sampling | None = None

    # ---- life ----

    async def start(self) -> None:
        """Load the data, then start trainer ranks and replicas at the same time."""
        self._load_data()
        self._rewards = RewardLoop(self.config.reward, components=self.config.algorithm.gdpo_reward_keys or ())
        self._placement = place_processes(self.config, self.plan.device)
        self._replicas = self._make_replicas(self._placement)
        # Tools and agent loops are loaded here, so that what is wrong with them shows before anything has started.
        self._sampling = Sampling(
            self.config,
            SampleGenerator(LLMServerClient(self._replicas), self.tokenizer, self._rewards, self.config),
            self.prompts,
            self._rewards,
            tokenizer=self.tokenizer,
            sleep=self._replicas.sleep,
            with_baselines="reward_baselines" in self._on_demand,
            total_steps=self.total_steps,
        )
        self._group = self._make_trainers(self._placement)
        if self.plan.device != "cpu" or is_multi_node():
            # Before the replicas, which open devices that their ranks have; what a node lacks shows here, too.
            await self._find_trainers()
        logger.info("starting %d trainer rank(s) and %d replica(s)", len(self.trainers), len(self.replicas.replicas))
        await gather_or_cancel(self._replicas.start(), self._start_trainers())
        freeze_heap()

    def _load_data(self) -> None:
        data, model = self.config.data, self.config.actor_rollout_ref.model
        self.tokenizer = hf_tokenizer(model.tokenizer_path or model.path, trust_remote_code=model.trust_remote_code)
        # A tokenizer of its own: training prompts are tokenised in a thread.
        own = copy.deepcopy(self.tokenizer)
        train = create_rl_dataset(data.train_files, own, data, max_samples=data.train_max_samples)
        seed = data.seed if data.seed is not None else self.config.trainer.seed
        by_prompt = self.config.actor_rollout_ref.rollout.partial_rollout
        loader = build_dataloader(
            train,
            batch_size=1 if by_prompt else data.gen_batch_size or data.train_batch_size,
            shuffle=data.shuffle,
            seed=seed,
            drop_last=True,
        )
        self.prompts = PromptSource(loader)
        validation = create_rl_dataset(data.val_files, self.tokenizer, data, max_samples=data.val_max_samples)
        self.val_loader = build_dataloader(
            validation,
            batch_size=data.val_batch_size or len(validation),
            shuffle=False,
            seed=seed,
            drop_last=False,
        )
        trainer, steps_per_epoch = self.config.trainer, len(train) // data.train_batch_size
        self.total_steps = trainer.total_training_steps or steps_per_epoch * trainer.total_epochs

    def _make_replicas(self, placement: Placement) -> ReplicaSet:
        config, count = self.config, replica_count(self.config)
        rollout = config.actor_rollout_ref.rollout
        arguments = {
            # On devices of their own they have nobody to sleep for.
            "rollout": dataclasses.replace(rollout, free_cache_engine=rollout.free_cache_engine and not rollout.nnodes),
            "model": config.actor_rollout_ref.model,
            "device": self.plan.device,
            "dtype": self.plan.rollout_dtype,
            "prompt_length": config.data.max_prompt_length,
            "response_length": config.data.max_response_length,
            "seed": config.trainer.seed,
            "timeline": current_timeline(),
        }
        environment = engine_environment(
            device=self.plan.device,
            threads=max(1, cpu_cores() // math.ceil(count / (rollout.nnodes or config.trainer.nnodes))),
            tensor_parallel_size=rollout.tensor_model_parallel_size,
        )
        replicas = []
        for rank, options in enumerate(placement.replicas):
            replicas.append(vLLMReplica(rank, arguments, options, dict(environment)))
        return ReplicaSet(replicas, on_start=self._note_endpoint)

    def _note_endpoint(self, rank: int, report: dict[str, Any]) -> None:
        logger.info("replica %d is up after %.1f s (pid %d)", rank, report["seconds"], report["pid"])
        if report["http"] is None:
            return
        # The key is a secret: it goes into a file that only this user reads, never into a log.
        path = Path(self.config.trainer.default_local_dir) / f"http_replica_{rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump({"base_url": report["http"] + "/v1", "api_key": report["api_key"]}, file)
        logger.info("replica %d serves %s/v1; its key is in %s", rank, report["http"], path)

    def _make_trainers(self, placement: Placement) -> WorkerGroup[TrainWorker]:
        environment = {}
        if self.plan.device == "cpu":
            environment = cpu_environment(max(1, cpu_cores() // self.config.trainer.n_gpus_per_node))
        elif self.plan.device == "npu":
            environment = hccl_environment(os.environ)
        return WorkerGroup(
            TrainWorker,
            [{**option, "runtime_env": {"env_vars": environment}} for option in placement.trainers],
            world_size=len(placement.trainers),
            config=self.config.actor_rollout_ref,
            device=self.plan.device,
            total_training_steps=self.total_steps,
            with_ref=self.with_ref,
            critic=self._critic,
            critic_warmup=self.config.trainer.critic_warmup,
            bypass=self.correction if self.correction.bypass_mode else None,
            seed=self.config.trainer.seed,
            rollout_dtype=self.plan.rollout_dtype,
            timeline=current_timeline(),
        )

    async def _start_trainers(self) -> None:
        started = time.perf_counter()
        if not self._nodes:
            await self._find_trainers()
        addresses = [node.address if self.config.trainer.nnodes > 1 else "127.0.0.1" for node in self._nodes]
        port = await self.trainers.rank(0, TrainWorker.reserve_port, addresses[0])
        await self.trainers.each(TrainWorker.setup, [(addresses[0], port, address) for address in addresses])
        logger.info("%d trainer rank(s) are up after %.1f s", len(self.trainers), time.perf_counter() - started)

    async def _find_trainers(self) -> None:
        """Where each rank is; and where some are on other nodes than the driver, that they see what it sees."""
        trainer = self.config.trainer
        self._nodes = await self.trainers.run(node_of, self.plan.device)
        seen = [node.device for node in self._nodes]
        for replica in self.replicas.replicas:
            replica.environment |= shared_devices(self.config, self.plan.device, seen, replica.rank)
        if self._elsewhere:
            await check_seen(files_of(self.config), self.trainers, self._elsewhere)
            if trainer.save_freq > 0:
                await check_shared(trainer.default_local_dir, self.trainers, self._elsewhere)

    @property
    def _elsewhere(self) -> list[str]:
        """Each rank's address, if any is on another node than the driver; else none."""
        here = current_node_id()
        return [node.address for node in self._nodes] if any(node.id != here for node in self._nodes) else []

    async def stop(self) -> None:
        """End every process that `start` started; harmless where it did not get that far."""
        # A stack runs every one of them, whichever fails; last in, first out.
        async with AsyncExitStack() as stack:
            if self._placement is not None:
                stack.callback(self._placement.release)
            if self._rewards is not None:
                stack.callback(self._rewards.close)
            if self._replicas is not None:
                stack.push_async_callback(self._replicas.stop)
            if self._group is not None:
                stack.callback(self._group.stop)
            if self._sampling is not None:
                stack.push_async_callback(self._sampling.close)
            stack.callback(self._transport.close)

    def _estimator_columns(self) -> tuple[str, ...]:
        """Columns that the estimator cannot do without.

        Raises:
            ValueError: this run never has one of them.
        """
        name = self.config.algorithm.adv_estimator
        wanted = required_columns(get_adv_estimator_fn(name))
        bypass, with_log_probs = self.correction.bypass_mode, self.config.actor_rollout_ref.rollout.calculate_log_probs
        there = {
            *ALWAYS_THERE,
            "old_log_probs",
            *(("rollout_log_probs",) if with_log_probs else ()),
            *(() if bypass else ("entropys", "sum_pi_squared")),
            *(("ref_log_prob",) if self.with_ref else ()),
            *(("values",) if self.with_critic else ()),
            *(("rollout_is_weights",) if self.correction.rollout_is and not bypass else ()),
        }
        if lacking := [column for column in wanted if column not in there]:
            hint = "; critic.enable=True gives values" if "values" in lacking else ""
            raise ValueError(
                f"algorithm.adv_estimator={name} asks for {', '.join(lacking)}, which this run does not have: it has "
                f"{', '.join(sorted(there))}{hint}"
            )
        return wanted

    @property
    def with_critic(self) -> bool:
        """Whether a critic is trained beside the policy."""
        return self._critic is not None

    @property
    def trainers(self) -> WorkerGroup[TrainWorker]:
        assert self._group is not None, "start() first"
        return self._group

    @property
    def replicas(self) -> ReplicaSet:
        assert self._replicas is not None, "start() first"
        return self._replicas

    @property
    def sampling(self) -> Sampling:
        """Answers of the replicas."""
        assert self._sampling is not None, "start() first"
        return self._sampling

    # ---- stages ----

    def forward_passes(self) -> ForwardPasses:
        """What every sample goes through before it is trained on, in this order."""
        roles, critic = self.config.actor_rollout_ref, self._critic
        passes: dict[str, Pass] = {}
        limits: list[MicroBatching] = []
        if not self.correction.bypass_mode:
            passes["old_log_prob"] = self.old_log_probs
            limits.append(log_prob_limits(roles.rollout, roles.actor))
        if self.with_ref:
            passes["ref"] = self.ref_log_prob
            limits.append(log_prob_limits(roles.ref, roles.actor))
        if critic is not None:
            passes["values"] = self.values
            limits.append(forward_limits(critic))
        return ForwardPasses(passes, limits, len(self.trainers))

    @property
    def streams(self) -> bool:
        """Whether samples can go through the passes while others are generated.

        Not where engine and trainer take turns with a device's memory, and not before it is known which samples a step
        trains on.
        """
        rollout = self.config.actor_rollout_ref.rollout
        chosen_later = self.config.algorithm.filter_groups.enable or rollout.partial_rollout
        return (self.plan.device == "cpu" or rollout.nnodes > 0) and not chosen_later

    async def old_log_probs(self, batch: DataProto, parts: Parts = None) -> DataProto:
        """`old_log_probs` [B, T], and `entropys` and `sum_pi_squared` for an estimator that names them.

        Args:
            batch: columns of a forward pass.
            parts: rows of each rank; None to divide them evenly.
        """
        extras = [name for name in ("entropys", "sum_pi_squared") if name in self._on_demand]
        return await self._on_shards(TrainWorker.call, "compute_log_prob", batch, parts, extras)

    async def ref_log_prob(self, batch: DataProto, parts: Parts = None) -> DataProto:
        """`ref_log_prob` [B, T]; arguments as for `old_log_probs`."""
        return await self._on_shards(TrainWorker.call, "compute_ref_log_prob", batch, parts)

    async def values(self, batch: DataProto, parts: Parts = None) -> DataProto:
        """The critic's `values` [B, T]; arguments as for `old_log_probs`."""
        return await self._on_shards(TrainWorker.call_critic, "compute_values", batch, parts)

    async def _on_shards(self, role: Any, method: str, batch: DataProto, parts: Parts, *arguments: Any) -> DataProto:
        shards, inverse = split_even(batch, len(self.trainers), self.config.trainer.balance_batch, parts)
        columns = await self.trainers.each(role, [(method, shard, *arguments) for shard in shards])
        return DataProto.concat(columns)[inverse]

    async def update_critic(self, batch: DataProto) -> dict[str, float]:
        """One pass of optimizer steps of the critic over the batch; metrics `critic/*`."""
        assert self._critic is not None and self._critic.ppo_mini_batch_size is not None
        shards = self._mini_batches(batch, self._critic.ppo_mini_batch_size, CRITIC_COLUMNS)
        return (await self.trainers.each(TrainWorker.call_critic, [("update_critic", shard) for shard in shards]))[0]

    async def update_actor(self, batch: DataProto) -> dict[str, float]:
        """One pass of optimizer steps over the batch; metrics `actor/*`."""
        shards = self._mini_batches(batch, self.config.actor_rollout_ref.actor.ppo_mini_batch_size, ACTOR_COLUMNS)
        return (await self.trainers.each(TrainWorker.call, [("update_actor", shard) for shard in shards]))[0]

    def _mini_batches(self, batch: DataProto, prompts: int, columns: tuple[str, ...]) -> list[list[DataProto]]:
        config = self.config.actor_rollout_ref
        return split_mini_batches(
            batch,
            prompts * config.rollout.n,
            len(self.trainers),
            columns=columns,
            balance=self.config.trainer.balance_batch,
            loss_scale_factor=config.actor.loss_scale_factor or self.config.data.max_response_length,
        )

    async def training_log_probs(self, batch: DataProto) -> torch.Tensor:
        """In bypass mode, log-probabilities [B, T] float32 of the policy when it trained on each sample of `batch`."""
        seen = torch.zeros(batch.batch["response_mask"].shape)
        for index, log_probs in await self.trainers.all(TrainWorker.call, "training_log_probs"):
            if len(index):
                seen[index] = log_probs
        return seen

    async def update_weights(self, version: int) -> dict[str, Any]:
        """Bring every replica, restarted ones included, to the trainer's weights as `version`."""
        await self.replicas.restart_dead()
        placed = [(replica, replica.node) for replica in self.replicas.alive]
        sender, receivers = self._transport.connect(TrainerSender(self.trainers), self._nodes[0], placed)
        return await self._updates.update(sender, receivers, version)

    # ---- what is read off ----

    def seqlen_metrics(self, batch: DataProto) -> dict[str, float]:
        """How evenly a forward pass over the batch lays its tokens on the ranks."""
        lengths = batch.batch["attention_mask"].sum(dim=-1).tolist()
        parts = partition(batch, len(self.trainers), self.config.trainer.balance_batch)
        return compute_seqlen_metrics(lengths, parts)

    # ---- checkpoints ----

    async def save(self, directory: Path, step: int) -> None:
        """Write everything a run needs to go on into `directory`."""
        await self.trainers.all(TrainWorker.call, "save_checkpoint", str(directory / "actor"))
        if self.with_critic:
            await self.trainers.all(TrainWorker.call_critic, "save_checkpoint", str(directory / "critic"))
        state = {
            "step": step,
            "train_loader": self.prompts.position.loader,
            "draws": self.prompts.position.draws,
            "kl_coef": self.kl_controller.value,
            "carried": [tuple(position) for position in self.sampling.carried()],
        }
        save_driver_state(directory, state)

    async def load(self, directory: Path) -> int:
        """Take the state of a checkpoint; the step it was written at."""
        state = load_driver_state(directory)
        if self.with_critic and not (directory / "critic").is_dir():
            raise CheckpointError(
                f"{directory} has no critic, and algorithm.adv_estimator={self.config.algorithm.adv_estimator} trains "
                "one: resume a run that had a critic, or start afresh with trainer.resume_mode=disable"
            )
        if self._elsewhere:
            await check_seen({"checkpoint": directory}, self.trainers, self._elsewhere)
        await self.trainers.all(TrainWorker.call, "load_checkpoint", str(directory / "actor"))
        if self.with_critic:
            await self.trainers.all(TrainWorker.call_critic, "load_checkpoint", str(directory / "critic"))
        self.prompts.restore(Place(state.get("draws", state["step"]), state["train_loader"]))
        self.sampling.carry([Position(*position) for position in state.get("carried", ())])
        if self.config.algorithm.kl_ctrl.type == "adaptive":
            self.kl_controller.value = state.get("kl_coef", self.kl_controller.value)
        return int(state["step"])
