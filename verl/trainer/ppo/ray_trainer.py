"""The training loop.

One step, and the columns that each stage reads and adds (`DataProto`, B samples, P and T padded widths):

    stage            reads                                           adds
    generate         rows: prompt_token_ids                          prompts, responses, input_ids, attention_mask,
                                                                     position_ids, response_mask, rollout_log_probs,
                                                                     weight_versions, reward_error
      (and rewards)  text, ground truth, as each sample finishes     token_level_scores; reward_baselines [B]
    old_log_probs    input_ids, response_mask                        old_log_probs; entropys, sum_pi_squared
    ref_log_prob     input_ids, response_mask                        ref_log_prob
    teacher          input_ids, attention_mask                       teacher_log_probs
    values           input_ids, response_mask                        values
    correct_rollout  old_log_probs, rollout_log_probs                rollout_is_weights, accepted_mask
    advantages       token_level_scores, uid, ref_log_prob, values   token_level_rewards, advantages, returns
    drop_rejected    accepted_mask                                   response_mask without the rejected tokens
    update_critic    values, returns                                 -
    update_actor     all of the above except values and returns      -
    update_weights   -                                               the replicas serve version `step`

The config decides which stages run: `ref_log_prob` runs with a KL term, `teacher` with distillation, `values` and
`update_critic` with an estimator that needs a critic. Columns after a semicolon exist if the estimator requires them.
In bypass mode the rollout's log-probabilities are used as `old_log_probs`, and the loss applies the correction. With
`actor.old_log_probs_from_rollout`, `old_log_probs` run after the pipeline, for as many samples as their check requires.

Schedule of step k (`pipeline.py`; v: the version of the weights, `passes`: old_log_probs, ref_log_prob, values):

    trainer.rollout_lag=0
    trainer   | wait, passes of k | advantages | update k |                    | new weights | validate |
    replicas  | generate k (v k-1)|                                            |    v k      |          |

    trainer.rollout_lag=1
    trainer   | passes of k, rest | advantages | update k | wait, passes of k+1| new weights | validate | save
    replicas  | generate k+1 (v k-1) ..........................................|    v k      |          | k+2 (v k)

    async_training.enable (S, U: weight updates of the replicas, local updates of the trainer)
    trainer   | wait for prompts, U | wait, U | ... | S, version k | ...     docs/fully_async.md
    replicas  | prompts start and end all the time, bounded by the staleness |

The passes process samples as they finish, in full micro-batches. They run after the generation if engine and trainer
take turns with the memory of a device, or if the samples of a step are chosen from the finished ones.

With lag the weights change between two rollouts. An engine finishes its requests before an update in any case. Waiting
for the whole rollout also keeps the later turns of a conversation under one version, so that every sample of a batch is
one update behind the weights that train on it. Each side waits for the slower one once per step: the trainer for the
last responses (`timing_s/wait_for_rollout`), the replicas for the update (`timing_s/wait_for_trainer`). The first batch
of a run, also of a resumed run, is not behind.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from verl.agent_loop.metrics import compute_agent_metrics
from verl.config import PPOConfig
from verl.config.record import VAL_ONLY_DIRECTORY
from verl.extension.upstream_names import missing_names
from verl.preflight import Plan
from verl.preflight.checks.resume import warn_of_changed_inputs
from verl.protocol import DataProto
from verl.single_controller.session import RaySession
from verl.timeline.spans import close_timeline, open_timeline, spanned
from verl.tools.utils.isolation import DaemonThreads
from verl.trainer.ppo.async_metrics import AsyncCounts, idle_metrics
from verl.trainer.ppo.checkpoint import CheckpointError, CheckpointStore
from verl.trainer.ppo.consistency import check_consistency
from verl.trainer.ppo.metrics import (
    compute_data_metrics,
    compute_mask_metrics,
    compute_throughput_metrics,
    compute_timing_metrics,
    compute_variance_proxy_metrics,
    compute_version_metrics,
)
from verl.trainer.ppo.off_policy import mismatch_metrics
from verl.trainer.ppo.profiling import StepProfiles
from verl.trainer.ppo.rewards_to_advantages import (
    apply_kl_penalty,
    batch_advantages,
    compute_advantage,
    compute_response_mask,
)
from verl.trainer.ppo.run_records import begin_records
from verl.trainer.ppo.run_state import HFExportError, export_run, load_run, save_run
from verl.trainer.ppo.runtime import Runtime
from verl.trainer.ppo.validation_run import ValidationRun
from verl.trainer.ppo.watchdog import watching
from verl.trainer.rollouts.batch_padding import pad_and_concat
from verl.trainer.rollouts.partial_rollout import staleness_metrics
from verl.trainer.rollouts.pipeline import RolloutPipeline, rollout_pipeline
from verl.utils.asyncio_utils import unless_failed
from verl.utils.metric import reduce_metrics
from verl.utils.run_lock import run_lock
from verl.utils.timing import marked_timer
from verl.utils.tracking import Progress, Tracking

__all__ = ["RayPPOTrainer", "apply_kl_penalty", "compute_advantage", "compute_response_mask", "run"]
__getattr__ = missing_names(__name__)
logger = logging.getLogger(__name__)


class RayPPOTrainer:
    """Runs the training loop on a `Runtime`, which holds the processes.

    Args:
        config: a checked config.
        runtime: trainer ranks, replicas, rewards and data, all running.
        store: the checkpoints of the run.
    """

    def __init__(self, config: PPOConfig, runtime: Runtime, store: CheckpointStore):
        self.config, self.runtime, self.store = config, runtime, store
        self.validation = ValidationRun(config, runtime)
        self.profiles = StepProfiles(config, runtime.processes)
        self.async_counts = AsyncCounts()
        self.step = 0

    async def fit(self) -> None:
        """Train to the last step, with validation, checkpoints and logs."""
        trainer, runtime = self.config.trainer, self.runtime
        await self.restore()
        async with self.rollouts() as rollouts:
            await runtime.update_weights(self.step)
            first_step = self.step + 1
            if trainer.check_consistency:
                await check_consistency(runtime, self.step)
            with self.tracking() as tracking, self.progress() as progress:
                if trainer.val_only or (trainer.val_before_train and self.step == 0):
                    tracking.log(await self.validate(tracking), self.step)
                if trainer.val_only:
                    return
                while self.step < runtime.data.total_steps:
                    self.step += 1
                    timing: dict[str, float] = {}
                    await self.profiles.begin(self.step, runtime.data.total_steps)
                    with marked_timer("step", timing, step=self.step):
                        batch, metrics = await self.train_step(rollouts, timing)
                        # The weights change between two rollouts, never inside one.
                        await rollouts.wait_idle(timing)
                        runtime.data.prompts.on_trained(batch)
                        with marked_timer("update_weights", timing):
                            metrics |= await runtime.update_weights(self.step)
                        if trainer.check_consistency and self.step == first_step:
                            await check_consistency(runtime, self.step)
                        if self.due(trainer.test_freq):
                            with marked_timer("testing", timing):
                                metrics |= await self.validate(tracking)
                    await self.profiles.end(self.step)
                    rollouts.on_new_weights(self.step)
                    metrics |= self.step_metrics(batch, timing)
                    await self.finish_step(batch, metrics, tracking, progress)

    # ---- stages that are more than one call ----

    def rollouts(self) -> AbstractAsyncContextManager[RolloutPipeline]:
        """Return the pipeline that generates the remaining batches and runs the forward passes on them."""
        return rollout_pipeline(
            self.runtime.sampler,
            self.runtime.forward_passes(),
            lag=self.config.trainer.rollout_lag,
            updates=self.runtime.local_updates,
            step=self.step,
            last_step=self.runtime.data.total_steps,
            overlaps_forward=self.runtime.overlaps_forward,
        )

    async def train_step(
        self, rollouts: RolloutPipeline, timing: dict[str, float]
    ) -> tuple[DataProto, dict[str, float]]:
        """Train on the batch of the present step; return the batch and the metrics of its generation and updates.

        The step of a fully asynchronous run has several local updates. Its batch is that of all of them, and a metric
        is the mean over them, or the maximum or minimum if its name says so.
        """
        done = [await self.local_update(rollouts, timing) for _ in range(self.runtime.local_updates)]
        if len(done) == 1:
            return done[0]
        names = dict.fromkeys(name for _, metrics in done for name in metrics)
        values = {name: [metrics[name] for _, metrics in done if name in metrics] for name in names}
        pad_token_id = self.runtime.data.tokenizer.pad_token_id
        return pad_and_concat([batch for batch, _ in done], pad_token_id), reduce_metrics(values)

    async def local_update(
        self, rollouts: RolloutPipeline, timing: dict[str, float]
    ) -> tuple[DataProto, dict[str, float]]:
        """Train on the next batch; return it with all columns, and its metrics."""
        runtime = self.runtime
        batch, metrics, state = await rollouts.finish(self.step, timing)
        if state is not None:
            runtime.data.prompts.state = state
        batch, reuse_metrics = await self.add_old_log_probs(batch, timing)
        with marked_timer("adv", timing):
            batch, advantage_metrics = self.advantages(batch)
        if runtime.with_critic:
            with marked_timer("update_critic", timing):
                metrics |= await runtime.update_critic(batch)
        if self.step > self.config.trainer.critic_warmup:
            with marked_timer("update_actor", timing):
                metrics |= await self.update_actor(batch)
        metrics |= compute_variance_proxy_metrics(batch, metrics.get("actor/grad_norm"))
        return batch, metrics | reuse_metrics | advantage_metrics

    async def add_old_log_probs(self, batch: DataProto, timing: dict[str, float]) -> tuple[DataProto, dict[str, float]]:
        """Add `old_log_probs` if the pipeline does not, because `RolloutLogProbs` does; return batch and metrics."""
        reuse = self.runtime.rollout_log_probs
        if reuse is None:
            return batch, {}
        with marked_timer("old_log_prob", timing):
            return await reuse.add_old_log_probs(batch, self.step, self.runtime.old_log_probs)

    def advantages(self, batch: DataProto) -> tuple[DataProto, dict[str, float]]:
        """Correct for the rollout policy, compute advantages and drop rejected tokens; return batch and metrics."""
        runtime = self.runtime
        return batch_advantages(batch, self.config.algorithm, runtime.correction, runtime.kl_controller)

    async def update_actor(self, batch: DataProto) -> dict[str, float]:
        """Train the actor; in bypass mode add the mismatch metrics, which need the log-probabilities of training."""
        metrics = await self.runtime.update_actor(batch)
        if self.runtime.correction.bypass_mode:
            log_probs = await self.runtime.training_log_probs(batch)
            metrics |= mismatch_metrics(batch, log_probs, self.runtime.correction)
        return metrics

    async def finish_step(
        self, batch: DataProto, metrics: dict[str, Any], tracking: Tracking, progress: Progress
    ) -> None:
        """Log the metrics of a step and save if it is due.

        Raises:
            QuantizationGuardError: the guard ends the run; a checkpoint is written before, unless the run writes none.
        """
        guard, save_freq = self.runtime.guard, self.config.trainer.save_freq
        if guard is not None:
            if guard.observe(metrics):
                guard.act(self.step, metrics, await self.runtime.output_errors(batch))
            metrics |= guard.metrics()
        stopped = None if guard is None else guard.error
        tracking.log(metrics, self.step)
        progress.update(self.step, metrics)
        if self.due(save_freq) or (stopped is not None and save_freq > 0):
            # Save after the log: a kill in between repeats a step, but loses no line of the log.
            await self.save_or_continue(tracking)
        if stopped is not None:
            raise stopped

    def due(self, every: int) -> bool:
        """Return True if an action with interval `every` (in steps) is due; it always is at the last step."""
        return every > 0 and (self.step % every == 0 or self.step == self.runtime.data.total_steps)

    @spanned("validate")
    async def validate(self, tracking: Tracking) -> dict[str, float]:
        """Validate, log samples and return metrics `val-core/*` and `val-aux/*`."""
        metrics, table = await self.validation.run(self.step)
        if table:
            tracking.log_generations(table, self.step)
        return metrics

    async def restore(self) -> None:
        """Resume from a checkpoint if `trainer.resume_mode` finds one."""
        trainer = self.config.trainer
        checkpoint = self.store.resolve(trainer.resume_mode, trainer.resume_from_path)
        if checkpoint is not None:
            warn_of_changed_inputs(checkpoint, self.runtime.inputs)
            self.step = await load_run(self.runtime, checkpoint)
            logger.info("resumed from %s at step %d", checkpoint, self.step)
            last = self.runtime.data.total_steps
            if self.step >= last and not trainer.val_only:
                logger.warning(
                    "the checkpoint is of step %d and the run ends after step %d: there is nothing left to train; for "
                    "more steps raise trainer.total_training_steps or trainer.total_epochs",
                    *(self.step, last),
                )
        self.resumed = checkpoint is not None
        self.continues = checkpoint is not None and checkpoint.parent.resolve() == self.store.root.resolve()

    async def save_or_continue(self, tracking: Tracking) -> None:
        """Save; if the disk refuses and `trainer.on_save_error` allows it, go on until the next save.

        Raises:
            CheckpointError: as `save`, at the last step always.
        """
        try:
            await self.save(tracking)
        except CheckpointError as error:
            is_last = self.step == self.runtime.data.total_steps
            if is_last or error.errno is None or self.config.trainer.on_save_error == "stop":
                raise
            logger.error("%s. The run continues (trainer.on_save_error=continue) and saves again later", error)
            tracking.log({"checkpoint/failed_saves": 1}, self.step)

    async def save(self, tracking: Tracking) -> None:
        """Write a checkpoint; log its time to the files, without another line on the console.

        Raises:
            CheckpointError: it could not be written. If only its Hugging Face directories could not, the checkpoint is
                published without them first, so that the run can resume from it.
        """
        timing: dict[str, float] = {}
        failed: HFExportError | None = None
        with marked_timer("save_checkpoint", timing), self.store.writing(self.step) as directory:
            await save_run(self.runtime, directory, self.step)
            try:
                await export_run(self.runtime, directory)
            except HFExportError as error:
                failed = error
        if failed is not None:
            raise CheckpointError(
                *([] if failed.errno is None else [failed.errno]),
                f"the checkpoint of step {self.step} was saved, but without the model in Hugging Face format (hf_model "
                f"in checkpoint.save_contents): {failed}. The same command resumes from it; `verl export` writes the "
                "model later",
            ) from failed
        backends = [name for name in self.config.trainer.logger if name != "console"]
        tracking.log({"timing_s/save_checkpoint": timing["save_checkpoint"]}, self.step, backend=backends)

    def step_metrics(self, batch: DataProto, timing: dict[str, float]) -> dict[str, Any]:
        """Return the metrics of a finished step."""
        data, n_devices = self.config.data, self.config.trainer.n_gpus_per_node * self.config.trainer.nnodes
        return {
            "training/global_step": self.step,
            "training/epoch": self.runtime.data.prompts.epoch,
            **compute_data_metrics(batch, data.max_prompt_length, data.max_response_length),
            **compute_agent_metrics(batch),
            **compute_mask_metrics(batch),
            **compute_version_metrics(batch.batch["weight_versions"], self.step - 1),
            **self.carried_metrics(batch, timing),
            **compute_timing_metrics(batch, timing),
            **compute_throughput_metrics(batch, timing, n_devices),
            **self.runtime.utilization_metrics(batch, timing),
            **self.runtime.seqlen_metrics(batch),
            **self.runtime.recovery.metrics(),
        }

    def carried_metrics(self, batch: DataProto, timing: dict[str, float]) -> dict[str, float]:
        """Return metrics of the prompts that continue after their step; empty if none does."""
        counts = self.runtime.sampler.prompt_counts()
        if counts is None:
            return {}
        metrics = staleness_metrics(batch, self.step - 1)
        metrics["partial_rollout/carried_prompts"] = float(counts.carried)
        if self.config.async_training.enable:
            metrics |= self.async_counts.metrics(batch, self.step - 1) | idle_metrics(timing)
            metrics["fully_async/count/total_generated_samples"] = float(counts.finished)
            metrics["fully_async/count/staleness_samples"] = float(counts.carried)
        return metrics

    def tracking(self) -> Tracking:
        """Open the loggers of `trainer.logger` and begin the records; with `val_only` these are files of their own."""
        trainer = self.config.trainer
        directory = Path(trainer.default_local_dir)
        resume_step, continued_step = (self.step if self.resumed else None), (self.step if self.continues else None)
        if trainer.val_only:
            directory, resume_step = directory / VAL_ONLY_DIRECTORY / f"global_step_{self.step}", None
            continued_step = None
        return Tracking(
            trainer.project_name,
            trainer.experiment_name,
            trainer.logger,
            config=self.config,
            default_local_dir=directory,
            resume_step=resume_step,
            total_steps=self.runtime.data.total_steps,
            before_files=lambda: begin_records(self.config, directory, resume_step=continued_step),
        )

    def progress(self) -> Progress:
        """Open the progress display."""
        return Progress(self.runtime.data.total_steps, self.step, lines="console" not in self.config.trainer.logger)


async def train(config: PPOConfig, plan: Plan) -> None:
    """Start the processes, train, and stop the processes even after an error."""
    store = CheckpointStore(config.trainer.default_local_dir, config.trainer.max_actor_ckpt_to_keep)
    if config.trainer.timeline is not None:
        open_timeline(config.trainer.timeline)
    async with watching(config) as watchdog:
        runtime = Runtime(config, plan)
        try:
            await unless_failed(runtime.start(), watchdog.failure())
            runtime.obey(watchdog)
            fit = RayPPOTrainer(config, runtime, store).fit()
            await unless_failed(fit, watchdog.failure(), runtime.recovery.failure())
        finally:
            await runtime.stop()
            close_timeline()


def run(config: PPOConfig, plan: Plan) -> None:
    """Train, from a thread without an event loop. Ctrl-C and SIGTERM stop all processes and free all shared memory.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once all processes have stopped.
        SystemExit: after SIGTERM, once all processes have stopped; the status is 143.
    """
    terminated = False

    async def main() -> None:
        task = asyncio.current_task()
        assert task is not None
        # asyncio.run waits for the threads of the default executor, where agent loops and datasets of users may hang.
        asyncio.get_running_loop().set_default_executor(DaemonThreads())

        def terminate() -> None:
            nonlocal terminated
            terminated = True
            task.cancel()

        with run_lock(config.trainer.default_local_dir), RaySession(config):
            # After ray.init, which installs its own handler.
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminate)
            await train(config, plan)

    try:
        asyncio.run(main())
    except asyncio.CancelledError:
        if not terminated:
            raise
        raise SystemExit(128 + signal.SIGTERM) from None
