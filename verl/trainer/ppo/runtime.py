"""The stages of a training step: each method runs one stage on the trainer ranks or the replicas."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, TypeVar, TypeVarTuple

import torch

from verl.agent_loop.generation import SampleGenerator
from verl.algorithms.kl_in_reward import get_kl_controller
from verl.config import PPOConfig
from verl.config.engine_pools import reward_model_pool, teacher_pool
from verl.config.rank_groups import critic_ranks_per_sample, ref_ranks_per_sample
from verl.config.roles import needs_critic, needs_ref, resolve_critic
from verl.config.rollout_correction import Correction, resolve
from verl.config.stream import carries_prompts, resolve_stream
from verl.config.weight_updates import full_update_reason, resolve_backend
from verl.preflight import Plan
from verl.preflight.inputs import RunInputs, collect_inputs
from verl.protocol import DataProto
from verl.single_controller.worker_group import WorkerGroup
from verl.trainer.ppo.batching import (
    ACTOR_COLUMNS,
    CRITIC_COLUMNS,
    FORWARD_COLUMNS,
    POLICY_COLUMNS,
    partition,
    split_even,
    split_mini_batches,
)
from verl.trainer.ppo.data import TrainingData, load_data
from verl.trainer.ppo.estimator_columns import estimator_columns
from verl.trainer.ppo.flops import Utilization
from verl.trainer.ppo.metrics import compute_seqlen_metrics
from verl.trainer.ppo.processes import Processes
from verl.trainer.ppo.quantization_guard import QuantizationGuard
from verl.trainer.ppo.recovery import ReplicaRecovery
from verl.trainer.ppo.reward_router import RewardRouter
from verl.trainer.ppo.rollout_log_probs import RolloutLogProbs
from verl.trainer.ppo.teacher import Teacher
from verl.trainer.ppo.trainer_sender import TrainerSender
from verl.trainer.ppo.watchdog import Watchdog
from verl.trainer.rollouts.forward_passes import ForwardPass, ForwardPasses, RankRows
from verl.trainer.rollouts.rollout_cache import make_rollout_cache
from verl.trainer.rollouts.sampling import RolloutSampler
from verl.utils.device_peaks import bf16_peak, device_model
from verl.utils.heap import freeze_heap
from verl.utils.quantization.encode_report import Errors, added_errors
from verl.utils.quantization.schemes import weight_format_class
from verl.workers.actor import log_prob_limits
from verl.workers.critic import forward_limits
from verl.workers.engine.micro_batch import MicroBatching
from verl.workers.reward import RewardLoop
from verl.workers.rollout.client import LLMServerClient
from verl.workers.rollout.replica import vLLMReplica
from verl.workers.train_worker import TrainWorker
from verl.workers.weight_sync.driver import Receiver
from verl.workers.weight_sync.transports.base import Node
from verl.workers.weight_sync.transports.create import create_transport
from verl.workers.weight_sync.updater import PAYS_ACROSS_HOSTS, PAYS_ON_ONE_HOST, WeightUpdater

R = TypeVar("R")
ShardT = TypeVar("ShardT")
Ts = TypeVarTuple("Ts")
_MEASURED_SAMPLES = 4


class Runtime:
    """The processes and data of a run. Call `start` first, and `stop` in any case.

    Args:
        config, plan: checked together; the plan holds the chosen device and dtypes.

    Attributes:
        with_critic, with_ref: True if the run has a critic, a reference model.
        guard: the guard of a quantized rollout; None without one.
        rollout_log_probs: takes `old_log_probs` from the rollout; None in a run that computes all of them.
        kl_controller: weight of the KL penalty in the reward.
        local_updates: updates of the trainer in a step, each with its own batch.
        processes: trainer ranks and replicas.

    Raises:
        ValueError: the advantage estimator requires a column that this run never has.
    """

    def __init__(self, config: PPOConfig, plan: Plan):
        self.config, self.plan = config, plan
        self.with_ref, self.with_critic = needs_ref(config), needs_critic(config)
        self._critic = resolve_critic(config) if self.with_critic else None
        self._correction = resolve(config.algorithm.rollout_correction)
        limits = config.actor_rollout_ref.rollout.quantization_guard
        self.guard = None if limits.max_k3_kl is None else QuantizationGuard(limits)
        reuse = config.actor_rollout_ref.actor.old_log_probs_from_rollout
        self.rollout_log_probs: RolloutLogProbs | None = None
        if reuse.enable:
            self.rollout_log_probs = RolloutLogProbs(reuse, seed=config.trainer.seed, ranks=plan.data_parallel)
        self.kl_controller = get_kl_controller(**dataclasses.asdict(config.algorithm.kl_ctrl))
        stream = resolve_stream(config)
        self.local_updates = 1 if stream is None else stream.updates
        self._estimator_columns = estimator_columns(config, self.correction)
        self.processes = Processes(
            config,
            plan,
            with_ref=self.with_ref,
            critic=self._critic,
            bypass=self.correction if self.correction.bypass_mode else None,
        )
        engine = config.actor_rollout_ref.rollout.checkpoint_engine
        backend = resolve_backend(config, plan.device)
        pays_below = PAYS_ON_ONE_HOST if backend == "naive" else PAYS_ACROSS_HOSTS
        self._weight_updater = WeightUpdater(
            delta=full_update_reason(config.actor_rollout_ref.rollout, plan.device) is None,
            pays_below=math.inf if engine.delta == "on" else pays_below,
            check_interval=engine.delta_check_interval,
            buckets_in_flight=engine.buckets_in_flight,
        )
        self._transport = create_transport(engine, backend, plan.device)
        self._inputs: RunInputs | None = None
        self._data: TrainingData | None = None
        self._rewards: RewardLoop | None = None
        self._router: RewardRouter | None = None
        self._generator: SampleGenerator | None = None
        self._sampler: RolloutSampler | None = None
        self._utilization: Utilization | None = None
        self._recovery: ReplicaRecovery | None = None

    @property
    def correction(self) -> Correction:
        """The rollout correction of the present step."""
        return self._correction if self.guard is None else self.guard.correction(self._correction)

    # ---- start and stop ----

    async def start(self) -> None:
        """Load the data, then start trainer ranks and replicas at the same time."""
        # Before the data is read: a later change of its files is not a change of this run.
        self._inputs = collect_inputs(self.config, self.plan.device)
        data = self._data = load_data(self.config)
        reward_model = reward_model_pool(self.config)
        if reward_model is not None:
            self._router = RewardRouter()
        self._rewards = RewardLoop(
            self.config.reward,
            components=self.config.algorithm.gdpo_reward_keys or (),
            reward_router_address=None if self._router is None else self._router.address,
        )
        self.processes.place()
        replicas = self.processes.replicas
        with_baselines = "reward_baselines" in self._estimator_columns
        # Load tools and agent loops before any process starts, so that their errors show at once.
        client = LLMServerClient(replicas)
        self._generator = SampleGenerator(client, data.tokenizer, self._rewards, self.config)
        await self._generator.start()
        self._sampler = RolloutSampler(
            self.config,
            self._generator,
            data.prompts,
            self._rewards,
            tokenizer=data.tokenizer,
            sleep=replicas.sleep,
            with_baselines=with_baselines,
            total_steps=data.total_steps,
            cache=make_rollout_cache(self.config, self._inputs, with_baselines=with_baselines),
        )
        await self.processes.start(data.total_steps, self.local_updates)
        if self._router is not None and reward_model is not None:
            await self._router.start(self.processes.engines(reward_model))
        self._utilization = await self._make_utilization()
        rollout = self.config.actor_rollout_ref.rollout
        self._recovery = ReplicaRecovery(
            replicas,
            max_restarts=rollout.max_restarts,
            watchdog=self.config.trainer.watchdog,
            send=self._send_weights,
            exclusive=self._trainers.exclusive,
            shares_memory=self.plan.device != "cpu" and rollout.free_cache_engine and not rollout.nnodes,
            one_update_per_version=self.local_updates == 1,
        )
        freeze_heap()

    async def _make_utilization(self) -> Utilization:
        models = set(await self._trainers.run(_device_model, self.plan.device))
        peak = bf16_peak(models.pop()) if len(models) == 1 else None
        infers = not self.correction.bypass_mode and self.rollout_log_probs is None
        return Utilization(self.config, self._critic, peak, compute_dtype=self.plan.compute_dtype, infers=infers)

    def obey(self, watchdog: Watchdog) -> None:
        """Let the watchdog kill replicas, which are then restarted, and limit the calls to the trainer ranks."""
        watchdog.kill_replica = self.recovery.kill
        settings = self.config.trainer.watchdog
        if settings.enable:
            self.recovery.write_stacks = watchdog.write_stacks
            self._trainers.limit_calls(settings.phase_timeout_s, watchdog.on_overdue)

    async def stop(self) -> None:
        """End every process that `start` started, even if `start` failed."""
        # The stack runs every callback even if one fails, the last one first.
        async with AsyncExitStack() as stack:
            if self._rewards is not None:
                stack.callback(self._rewards.close)
            stack.push_async_callback(self.processes.stop)
            if self._recovery is not None:
                stack.push_async_callback(self._recovery.close)
            if self._router is not None:
                stack.push_async_callback(self._router.stop)
            if self._generator is not None:
                stack.callback(self._generator.close)
            if self._sampler is not None:
                stack.push_async_callback(self._sampler.close)
            stack.callback(self._transport.close)

    @property
    def inputs(self) -> RunInputs:
        """Fingerprints of the input files, and versions of the software."""
        assert self._inputs is not None, "call start() first"
        return self._inputs

    @property
    def data(self) -> TrainingData:
        """Tokenizer, training prompts and validation set."""
        assert self._data is not None, "call start() first"
        return self._data

    @property
    def sampler(self) -> RolloutSampler:
        """Generates training batches and validation samples."""
        assert self._sampler is not None, "call start() first"
        return self._sampler

    @property
    def recovery(self) -> ReplicaRecovery:
        """Restarts dead replicas."""
        assert self._recovery is not None, "call start() first"
        return self._recovery

    @property
    def _trainers(self) -> WorkerGroup[TrainWorker]:
        return self.processes.trainers

    # ---- stages ----

    def forward_passes(self) -> ForwardPasses:
        """Return the passes that every sample needs before it is trained on, in the order in which they run.

        With `rollout_log_probs` only some samples need `old_log_probs`; `RayPPOTrainer.add_old_log_probs` adds them.
        """
        roles, critic = self.config.actor_rollout_ref, self._critic
        passes: dict[str, ForwardPass] = {}
        limits: list[MicroBatching] = []
        shards: list[int] = []
        if not self.correction.bypass_mode and self.rollout_log_probs is None:
            passes["old_log_prob"] = self.old_log_probs
            limits.append(log_prob_limits(roles.rollout, roles.actor))
            shards.append(self.plan.data_parallel)
        if self.with_ref:
            passes["ref"] = self.ref_log_prob
            limits.append(log_prob_limits(roles.ref, roles.actor))
            shards.append(self._ref_shards)
        if (teacher := teacher_pool(self.config)) is not None:
            passes["teacher"] = Teacher(self.processes.engines(teacher)).score
        if critic is not None:
            passes["values"] = self.values
            limits.append(forward_limits(critic))
            shards.append(self._critic_shards)
        return ForwardPasses(passes, limits, min(shards, default=1))

    @property
    def _ref_shards(self) -> int:
        roles = self.config.actor_rollout_ref
        return len(self._trainers) // ref_ranks_per_sample(roles.ref, roles.actor)

    @property
    def _critic_shards(self) -> int:
        return len(self._trainers) // critic_ranks_per_sample(self.config.critic)

    @property
    def overlaps_forward(self) -> bool:
        """True if samples can go through the passes while others are generated.

        False if engine and trainer take turns with the memory of a device, and if the samples of a step are chosen
        only after generation.
        """
        rollout = self.config.actor_rollout_ref.rollout
        chosen_later = self.config.algorithm.filter_groups.enable or carries_prompts(self.config)
        return (self.plan.device == "cpu" or rollout.nnodes > 0) and not chosen_later

    async def old_log_probs(self, batch: DataProto, rank_rows: RankRows = None) -> DataProto:
        """Compute `old_log_probs` [B, T], and `entropys` and `sum_pi_squared` [B, T] if the estimator requires them.

        Args:
            batch: columns of a forward pass.
            rank_rows: rows of each shard; None to divide them evenly.
        """
        extras = [name for name in ("entropys", "sum_pi_squared") if name in self._estimator_columns]
        return await self._forward(
            TrainWorker.compute_log_prob, batch, self.plan.data_parallel, rank_rows, extras, columns=POLICY_COLUMNS
        )

    async def update_log_probs(self, batch: DataProto) -> DataProto:
        """Compute `old_log_probs` [B, T] in the mode of an update, without an update; see `check_consistency`."""
        return await self._forward(
            TrainWorker.compute_update_log_prob, batch, self.plan.data_parallel, None, columns=POLICY_COLUMNS
        )

    async def ref_log_prob(self, batch: DataProto, rank_rows: RankRows = None) -> DataProto:
        """Compute `ref_log_prob` [B, T]; arguments as for `old_log_probs`."""
        return await self._forward(TrainWorker.compute_ref_log_prob, batch, self._ref_shards, rank_rows)

    async def values(self, batch: DataProto, rank_rows: RankRows = None) -> DataProto:
        """Compute the critic's `values` [B, T]; arguments as for `old_log_probs`."""
        return await self._forward(TrainWorker.compute_values, batch, self._critic_shards, rank_rows)

    async def _forward(
        self,
        method: Callable[[TrainWorker, DataProto, *Ts], DataProto],
        batch: DataProto,
        count: int,
        rank_rows: RankRows,
        *arguments: *Ts,
        columns: tuple[str, ...] = FORWARD_COLUMNS,
    ) -> DataProto:
        """Run one forward pass with the batch in `count` shards; return its columns in the order of the batch."""
        if rank_rows is not None and len(rank_rows) != count:
            rank_rows = None  # they are those of a pass whose samples another number of ranks share
        shards, inverse = split_even(batch, count, self.config.trainer.balance_batch, rank_rows, columns=columns)
        return DataProto.concat(await self._each_shard(method, shards, *arguments))[inverse]

    async def _each_shard(
        self, method: Callable[[TrainWorker, ShardT, *Ts], R], shards: Sequence[ShardT], *arguments: *Ts
    ) -> list[R]:
        """Call a method on every rank; return one result per shard.

        Ranks that share samples are neighbors. They get the same shard, and have the same result.
        """
        shared = len(self._trainers) // len(shards)
        per_rank = [(shard, *arguments) for shard in shards for _ in range(shared)]
        return (await self._trainers.each(method, per_rank))[::shared]

    async def update_critic(self, batch: DataProto) -> dict[str, float]:
        """Train the critic on the batch; return metrics `critic/*`."""
        assert self._critic is not None and self._critic.ppo_mini_batch_size is not None
        shards = self._split_mini_batches(batch, self._critic.ppo_mini_batch_size, self._critic_shards, CRITIC_COLUMNS)
        return (await self._each_shard(TrainWorker.update_critic, shards))[0]

    async def update_actor(self, batch: DataProto) -> dict[str, float]:
        """Train the actor on the batch; return metrics `actor/*`."""
        self.recovery.on_training()
        prompts = self.config.actor_rollout_ref.actor.ppo_mini_batch_size
        shards = self._split_mini_batches(batch, prompts, self.plan.data_parallel, ACTOR_COLUMNS)
        return (await self._each_shard(TrainWorker.update_actor, shards))[0]

    def _split_mini_batches(
        self, batch: DataProto, prompts: int, count: int, columns: tuple[str, ...]
    ) -> list[list[DataProto]]:
        config = self.config.actor_rollout_ref
        return split_mini_batches(
            batch,
            prompts * config.rollout.n,
            count,
            columns=columns,
            balance=self.config.trainer.balance_batch,
            loss_scale_factor=config.actor.loss_scale_factor or self.config.data.max_response_length,
        )

    async def training_log_probs(self, batch: DataProto) -> torch.Tensor:
        """Return log-probabilities [B, T] float32 of the policy when it trained on each sample; for bypass mode."""
        log_probs = torch.zeros(batch.batch["response_mask"].shape)
        for index, values in await self._trainers.all(TrainWorker.training_log_probs):
            if len(index):
                log_probs[index] = values
        return log_probs

    async def update_weights(self, version: int) -> dict[str, Any]:
        """Bring every replica, restarted ones included, to the trainer's weights as `version`; return metrics."""
        return await self.recovery.update(version)

    async def _send_weights(
        self, replicas: Sequence[vLLMReplica], version: int, *, restore: bool = False
    ) -> dict[str, Any]:
        receivers: list[tuple[Receiver, Node]] = []
        for replica in replicas:
            assert replica.node is not None, "a live replica has a node"
            receivers.append((replica, replica.node))
        home = self.processes.nodes[0]
        sender, connected = self._transport.connect(TrainerSender(self._trainers), home, receivers)
        send = self._weight_updater.restore if restore else self._weight_updater.update
        return await send(sender, connected, version)

    async def output_errors(self, batch: DataProto) -> Errors:
        """Return the errors of the quantized rollout in the output of each layer, for the shortest samples of a batch.

        Few and short ones, because the engine may hold most of a device's memory. Empty if the format of the rollout
        has no numbers that the trainer can compute with.
        """
        if not weight_format_class(self.config.actor_rollout_ref.rollout.quantization).supports_qat:
            return {}
        ranks, count = len(self._trainers), self.plan.data_parallel
        shortest = batch.batch["attention_mask"].sum(-1).argsort(stable=True)[: max(_MEASURED_SAMPLES, count)]
        shards, _ = split_even(batch[shortest], count, balance=False)
        # Every rank measures the positions that it computes.
        found = await self._trainers.each(
            TrainWorker.output_errors, [(shards[rank * count // ranks],) for rank in range(ranks)]
        )
        return added_errors(found)

    async def export_float32(self, path: str) -> None:
        """Write the policy's master weights as a Hugging Face directory in float32, on the host of rank 0."""
        await self._trainers.all(TrainWorker.export_float32, path)

    def utilization_metrics(self, batch: DataProto, timing: Mapping[str, float]) -> dict[str, float]:
        """Return `perf/mfu/*` of a step; see `Utilization.metrics`."""
        assert self._utilization is not None, "call start() first"
        return self._utilization.metrics(batch, timing)

    def seqlen_metrics(self, batch: DataProto) -> dict[str, float]:
        """Return how evenly a forward pass over the batch distributes its tokens over the ranks."""
        lengths = batch.batch["attention_mask"].sum(dim=-1).tolist()
        parts = partition(batch, self.plan.data_parallel, self.config.trainer.balance_batch)
        return compute_seqlen_metrics(lengths, parts)


def _device_model(worker: TrainWorker, device: str) -> str:
    return device_model(device)
