"""The training loop.

One step, and for each stage the columns it reads and adds (`DataProto`, B samples, P and T padded widths):

    stage            reads                                           adds
    generate         rows: prompt_token_ids                          prompts, responses, input_ids, attention_mask,
                                                                     position_ids, response_mask, rollout_log_probs,
                                                                     weight_versions, reward_error
      (and rewards)  text, ground truth, as each sample finishes     token_level_scores; reward_baselines [B]
    old_log_probs    input_ids, response_mask                        old_log_probs; entropys, sum_pi_squared
    ref_log_prob     input_ids, response_mask                        ref_log_prob
    values           input_ids, response_mask                        values
    correct_rollout  old_log_probs, rollout_log_probs                rollout_is_weights, accepted_mask
    advantages       token_level_scores, uid, ref_log_prob, values   token_level_rewards, advantages, returns
    drop_rejected    accepted_mask                                   response_mask without what was rejected
    update_critic    values, returns                                 -
    update_actor     all of the above but values and returns         -
    update_weights   -                                               the replicas serve version `step`

Which of them run depends on the config: `ref_log_prob` with a KL term, `values` and `update_critic` with an estimator
that needs a critic; columns behind a semicolon are there where the estimator names them. In bypass mode the rollout's
log-probabilities stand for `old_log_probs`, and the loss corrects.

When they run, for step k (`pipeline.py`; v: the version of the weights, `passes`: old_log_probs, ref_log_prob, values):

    trainer.rollout_lag=0
    trainer   | wait, passes of k | advantages | update k |                    | new weights | validate |
    replicas  | generate k (v k-1)|                                            |    v k      |          |

    trainer.rollout_lag=1
    trainer   | passes of k, rest | advantages | update k | wait, passes of k+1| new weights | validate | save
    replicas  | generate k+1 (v k-1) ..........................................|    v k      |          | k+2 (v k)

The passes go over samples as these finish, in full micro-batches; not where engine and trainer take turns with a
device's memory, or where a step's samples are chosen from those that finish: there they follow the generation.

With lag the weights change between two rollouts. An engine would let its requests finish before an update in any case;
to wait for the whole rollout also keeps the later turns of a conversation under one version, so that all of a batch is
one update behind the weights that train on it. Each side waits for the slower one once a step: the trainer for the last
answers (`timing_s/wait_for_rollout`), the replicas for the update (`timing_s/wait_for_trainer`). The first batch of a
run, of a resumed one too, is not behind.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from contextlib import AbstractAsyncContextManager
from typing import Any

from verl.agent_loop.metrics import compute_agent_metrics
from verl.config import PPOConfig
from verl.config.record import write_record
from verl.preflight import Plan
from verl.protocol import DataProto
from verl.single_controller.session import RaySession
from verl.trainer.ppo.checkpoint import CheckpointStore
from verl.trainer.ppo.metrics import (
    compute_data_metrics,
    compute_throughput_metrics,
    compute_timing_metrics,
    compute_version_metrics,
)
from verl.trainer.ppo.off_policy import correct_rollout, drop_rejected, mismatch_metrics
from verl.trainer.ppo.rewards_to_advantages import apply_advantages, apply_kl_penalty
from verl.trainer.ppo.runtime import Runtime
from verl.trainer.ppo.validation_run import ValidationRun
from verl.trainer.rollouts.pipeline import RolloutPipeline, rollout_pipeline
from verl.utils.timeline import close_timeline, open_timeline, spanned
from verl.utils.timing import marked_timer
from verl.utils.tracking import Progress, Tracking

logger = logging.getLogger(__name__)


class RayPPOTrainer:
    """Runs the loop over a `Runtime`, which holds the processes.

    Args:
        config: checked.
        runtime: trainer ranks, replicas, rewards and data, all running.
        store: where checkpoints go.
    """

    def __init__(self, config: PPOConfig, runtime: Runtime, store: CheckpointStore):
        self.config, self.runtime, self.store = config, runtime, store
        self.validation = ValidationRun(config, runtime)
        self.step = 0

    async def fit(self) -> None:
        """Train to the last step; validate before, during and after; save; log."""
        trainer, runtime = self.config.trainer, self.runtime
        await self.restore()
        async with self.rollouts() as rollouts:
            with self.tracking() as tracking, self.progress() as progress:
                await runtime.update_weights(self.step)
                if trainer.val_only or (trainer.val_before_train and self.step == 0):
                    tracking.log(await self.validate(tracking), self.step)
                if trainer.val_only:
                    return
                while self.step < runtime.total_steps:
                    self.step += 1
                    timing: dict[str, float] = {}
                    with marked_timer("step", timing, step=self.step):
                        batch, metrics, runtime.prompts.position = await rollouts.finish(self.step, timing)
                        with marked_timer("adv", timing):
                            batch, of_advantages = self.advantages(batch)
                        if runtime.with_critic:
                            with marked_timer("update_critic", timing):
                                metrics |= await runtime.update_critic(batch)
                        if self.step > trainer.critic_warmup:
                            with marked_timer("update_actor", timing):
                                metrics |= await self.update_actor(batch)
                        # The weights change between two rollouts, never inside one.
                        await rollouts.settle(timing)
                        with marked_timer("update_weights", timing):
                            metrics |= await runtime.update_weights(self.step)
                        if self.due(trainer.test_freq):
                            with marked_timer("testing", timing):
                                metrics |= await self.validate(tracking)
                    rollouts.serving(self.step)
                    metrics |= of_advantages | self.describe(batch, timing)
                    tracking.log(metrics, self.step)
                    progress.update(self.step, metrics)
                    if self.due(trainer.save_freq):
                        # After the log: a kill in between repeats a step, it never loses a line.
                        await self.save(tracking)

    # ---- stages that are more than one call ----

    def rollouts(self) -> AbstractAsyncContextManager[RolloutPipeline]:
        """The batches of the steps that are left, generated and put through the forward passes."""
        return rollout_pipeline(
            self.runtime.sampling,
            self.runtime.forward_passes(),
            lag=self.config.trainer.rollout_lag,
            step=self.step,
            last_step=self.runtime.total_steps,
            streams=self.runtime.streams,
        )

    def advantages(self, batch: DataProto) -> tuple[DataProto, dict[str, float]]:
        """Correct for the rollout policy, turn scores into advantages, leave rejected tokens out of the updates."""
        runtime, algorithm = self.runtime, self.config.algorithm
        metrics: dict[str, float] = {}
        if runtime.correction.bypass_mode:
            # Another name for them costs no forward pass.
            batch = batch.union(DataProto.from_dict(tensors={"old_log_probs": batch.batch["rollout_log_probs"]}))
        elif "rollout_log_probs" in batch.batch:
            batch, metrics = correct_rollout(batch, runtime.correction)
        batch, of_kl = apply_kl_penalty(batch, algorithm, runtime.kl_controller)
        return drop_rejected(apply_advantages(batch, algorithm)), metrics | of_kl

    async def update_actor(self, batch: DataProto) -> dict[str, float]:
        metrics = await self.runtime.update_actor(batch)
        if self.runtime.correction.bypass_mode:
            seen = await self.runtime.training_log_probs(batch)
            metrics |= mismatch_metrics(batch, seen, self.runtime.correction)
        return metrics

    def due(self, every: int) -> bool:
        """Whether something that happens every `every` steps happens now; the last step always counts."""
        return every > 0 and (self.step % every == 0 or self.step == self.runtime.total_steps)

    @spanned("validate")
    async def validate(self, tracking: Tracking) -> dict[str, float]:
        metrics, table = await self.validation.run(self.step)
        if table:
            tracking.log_generations(table, self.step)
        return metrics

    async def restore(self) -> None:
        """Go on from a checkpoint where there is one to go on from."""
        trainer = self.config.trainer
        checkpoint = self.store.resolve(trainer.resume_mode, trainer.resume_from_path)
        if checkpoint is not None:
            self.step = await self.runtime.load(checkpoint)
            logger.info("resumed from %s at step %d", checkpoint, self.step)
        self.resumed = checkpoint is not None

    async def save(self, tracking: Tracking) -> None:
        timing: dict[str, float] = {}
        with marked_timer("save_checkpoint", timing), self.store.writing(self.step) as directory:
            await self.runtime.save(directory, self.step)
        quiet = [name for name in self.config.trainer.logger if name != "console"]
        tracking.log({"timing_s/save_checkpoint": timing["save_checkpoint"]}, self.step, backend=quiet)

    def describe(self, batch: DataProto, timing: dict[str, float]) -> dict[str, Any]:
        """What can be read off a finished step."""
        data, n_devices = self.config.data, self.config.trainer.n_gpus_per_node * self.config.trainer.nnodes
        return {
            "training/global_step": self.step,
            "training/epoch": self.runtime.prompts.epoch,
            **compute_data_metrics(batch, data.max_prompt_length, data.max_response_length),
            **compute_agent_metrics(batch),
            **compute_version_metrics(batch.batch["weight_versions"], self.step - 1),
            **compute_timing_metrics(batch, timing),
            **compute_throughput_metrics(batch, timing, n_devices),
            **self.runtime.seqlen_metrics(batch),
        }

    def tracking(self) -> Tracking:
        trainer = self.config.trainer
        return Tracking(
            trainer.project_name,
            trainer.experiment_name,
            trainer.logger,
            config=self.config,
            default_local_dir=trainer.default_local_dir,
            resume_step=self.step if self.resumed else None,
            total_steps=self.runtime.total_steps,
        )

    def progress(self) -> Progress:
        return Progress(self.runtime.total_steps, self.step, lines="console" not in self.config.trainer.logger)


async def train(config: PPOConfig, plan: Plan) -> None:
    """Start everything, train, stop everything, whatever happens in between."""
    store = CheckpointStore(config.trainer.default_local_dir, config.trainer.max_actor_ckpt_to_keep)
    write_record(config, config.trainer.default_local_dir)
    if config.trainer.timeline is not None:
        open_timeline(config.trainer.timeline)
    runtime = Runtime(config, plan)
    try:
        await runtime.start()
        await RayPPOTrainer(config, runtime, store).fit()
    finally:
        await runtime.stop()
        close_timeline()


def run(config: PPOConfig, plan: Plan) -> None:
    """Train, from a plain thread. Ctrl-C and SIGTERM end in a clean stop: no process and no shared memory stays behind.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once everything is stopped.
        SystemExit: after SIGTERM, likewise, with status 143.
    """
    terminated = False

    async def main() -> None:
        task = asyncio.current_task()
        assert task is not None

        def terminate() -> None:
            nonlocal terminated
            terminated = True
            task.cancel()

        with RaySession(config):
            # After Ray, which puts a handler of its own in place.
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminate)
            await train(config, plan)

    try:
        asyncio.run(main())
    except asyncio.CancelledError:
        if not terminated:
            raise
        raise SystemExit(128 + signal.SIGTERM) from None
