"""Sampling from the replicas: the batch of a training step, and the samples of a validation."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch

from verl.agent_loop.detokenize import decode
from verl.agent_loop.generation import GenerationTimes, SampleGenerator, ScoredSample, to_batch
from verl.config import PPOConfig
from verl.protocol import DataProto
from verl.timeline.spans import spanned
from verl.trainer.rollouts.dynamic_sampling import GroupFilter
from verl.trainer.rollouts.partial_rollout import make_carried_groups
from verl.trainer.rollouts.pipeline import Generated, OnSampleFinished
from verl.trainer.rollouts.prompts import LoaderState, Prompt, PromptId, PromptSource
from verl.trainer.rollouts.rollout_cache import RolloutCache
from verl.trainer.rollouts.sample_files import dump_generations
from verl.utils.asyncio_utils import gather_or_cancel
from verl.utils.timing import add_stage, marked_timer
from verl.workers.reward import RewardLoop, RewardResult, renamed_extra
from verl.workers.reward.counts import check_scored, reward_metrics

logger = logging.getLogger(__name__)


class Sampled(NamedTuple):
    """The samples of some rows.

    Attributes:
        samples: `rollout.n` samples per row, next to each other.
        baselines: one greedy sample per row if the estimator needs a baseline; otherwise empty.
        times: times of both.
    """

    samples: list[ScoredSample]
    baselines: list[ScoredSample]
    times: GenerationTimes


class PromptCounts(NamedTuple):
    """Numbers of prompts in a run that carries prompts over.

    Attributes:
        finished: prompts that this process finished.
        carried: prompts that continued after the last step.
    """

    finished: int
    carried: int


class RolloutSampler:
    """Generates scored samples with the sampling parameters of the config.

    Args:
        config: the whole config.
        generator: runs agent loops over rows.
        source: the training prompts.
        rewards: its scorer is named in the error if scoring fails for every sample.
        tokenizer: the model's tokenizer.
        sleep: makes the replicas release the memory that the trainer needs.
        with_baselines: True if the estimator compares with a greedy response to each prompt.
        total_steps: number of training steps of the run.
        cache: samples of earlier runs, and a place for those of this run; None without `skip.rollout`.
    """

    def __init__(
        self,
        config: PPOConfig,
        generator: SampleGenerator,
        source: PromptSource,
        rewards: RewardLoop,
        *,
        tokenizer: Any,
        sleep: Callable[[], Awaitable[None]],
        with_baselines: bool,
        total_steps: int,
        cache: RolloutCache | None = None,
    ):
        self._cache = cache
        self._config, self._generator, self._source, self._rewards = config, generator, source, rewards
        self._tokenizer, self._sleep, self._with_baselines = tokenizer, sleep, with_baselines
        self._carried = make_carried_groups(
            config, lambda row: self._sample([row]), self._single_prompts(), total_steps
        )
        self._updates_of_step = 0
        self._rewards_of_step: list[RewardResult] = []
        self._dump_rows: list[dict[str, Any]] = []

    async def generate(
        self,
        step: int,
        timing: MutableMapping[str, float],
        on_sample_finished: OnSampleFinished | None = None,
    ) -> Generated:
        """Generate `train_batch_size` prompts with `rollout.n` scored samples each, next to each other.

        If the estimator needs a baseline, the column `reward_baselines` [B] holds the score of a greedy response to the
        same prompt. With `filter_groups` the batch comes from as many draws of prompts as necessary. If prompts are
        carried over, it holds those of a local update that finish first, while the others keep running. At the end of a
        step the replicas sleep if the trainer needs their memory.

        Args:
            step: the step that trains on the batch.
            timing: receives `gen`, until the last response, and `reward`, from there until the last score.
            on_sample_finished: called with each sample that finishes.

        Raises:
            RewardError: scoring failed for every sample of the step.
            DynamicSamplingError: not enough groups have samples that differ.
        """
        state: LoaderState | None
        if self._config.algorithm.filter_groups.enable:
            batch, metrics, state = await self._generate_filtered(step, timing)
        elif self._carried is not None:
            batch, metrics, state = await self._generate_partial(step, timing)
        else:
            draw = await self._source.next()
            batch = await self._generate_rows(draw.rows, step, timing, on_sample_finished)
            metrics, state = {}, draw.state
        batch.meta_info["global_step"] = step
        self._updates_of_step += 1
        if self._carried is None or self._updates_of_step == self._carried.updates:
            self._updates_of_step = 0
            metrics |= await self._finish_step(step)
        return Generated(batch, metrics, state)

    async def _generate_filtered(
        self, step: int, timing: MutableMapping[str, float]
    ) -> tuple[DataProto, dict[str, float], LoaderState]:
        groups = GroupFilter(
            self._config.algorithm.filter_groups,
            train_batch_size=self._config.data.train_batch_size,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        state = self._source.state
        while not groups.full:
            draw = await self._source.next()
            groups.add(await self._generate_rows(draw.rows, step, timing, None))
            state = draw.state
        return groups.build_batch(), groups.metrics(), state

    async def _generate_partial(
        self, step: int, timing: MutableMapping[str, float]
    ) -> tuple[DataProto, dict[str, float], None]:
        assert self._carried is not None
        with marked_timer("gen", timing, step=step):
            groups = await self._carried.collect(step)
        batch = self._add_to_step(
            [sample for group in groups for sample in group.samples],
            [baseline for group in groups for baseline in group.baselines],
        )
        return batch, {}, None

    def on_new_weights(self, version: int) -> None:
        """Start prompts that continue after their step, under the weights of step `version`."""
        if self._carried is not None:
            self._carried.begin_step(version + 1)

    async def pause(self) -> float | None:
        """Start no further prompt before the next weights, and wait for others if the config asks for it.

        Returns:
            Seconds since the last call in which nothing was generated; None if prompts do not start by themselves.
        """
        if self._carried is None:
            return None
        idle = await self._carried.pause()
        return idle if self._config.async_training.enable else None

    @spanned("generate")
    async def _generate_rows(
        self,
        rows: Sequence[dict[str, Any]],
        step: int,
        timing: MutableMapping[str, float],
        on_sample_finished: OnSampleFinished | None,
    ) -> DataProto:
        samples, baselines, times = await self._cached_or_new(rows, step, on_sample_finished)
        add_stage("gen", timing, times.started, times.generated, step=step)
        add_stage("reward", timing, times.generated, times.scored, step=step)
        return self._add_to_step(samples, baselines)

    async def _cached_or_new(
        self, rows: Sequence[dict[str, Any]], step: int, on_sample_finished: OnSampleFinished | None
    ) -> Sampled:
        """Return the samples that the cache has for this step, or generate them and give them to the cache."""
        if self._cache is None:
            return await self._sample(rows, on_sample_finished)
        started = time.monotonic_ns()
        cached = await asyncio.to_thread(self._cache.load, step, rows)
        if cached is None:
            sampled = await self._sample(rows, on_sample_finished)
            await asyncio.to_thread(self._cache.save, step, rows, [*sampled.samples, *sampled.baselines])
            return sampled
        number = len(rows) * self._config.actor_rollout_ref.rollout.n
        samples, baselines = cached[:number], cached[number:]
        if on_sample_finished is not None:
            for index, sample in enumerate(samples):
                on_sample_finished(index, sample, len(sample.output.prompt_ids) + len(sample.output.response_ids))
        read = time.monotonic_ns()
        return Sampled(samples, baselines, GenerationTimes(started, read, read))

    async def _sample(
        self, rows: Sequence[dict[str, Any]], on_sample_finished: OnSampleFinished | None = None
    ) -> Sampled:
        rollout = self._config.actor_rollout_ref.rollout
        parameters = {"temperature": rollout.temperature, "top_p": rollout.top_p, "top_k": rollout.top_k}
        if rollout.calculate_log_probs:
            parameters["logprobs"] = 0
        repeated = [row for row in rows for _ in range(rollout.n)]
        if on_sample_finished is None:
            sampled = self._generator.generate(repeated, parameters)
        else:
            sampled = self._sample_one_by_one(repeated, parameters, on_sample_finished)
        if not self._with_baselines:
            samples, times = await sampled
            return Sampled(samples, [], times)
        greedy = self._generator.generate(list(rows), {"temperature": 0.0})
        (samples, times), (baselines, greedy_times) = await gather_or_cancel(sampled, greedy)
        return Sampled(samples, baselines, _combined_times([times, greedy_times]))

    async def _sample_one_by_one(
        self, rows: Sequence[dict[str, Any]], parameters: dict[str, Any], on_sample_finished: OnSampleFinished
    ) -> tuple[list[ScoredSample], GenerationTimes]:
        async def sample_one(index: int, row: dict[str, Any]) -> tuple[ScoredSample, GenerationTimes]:
            (sample,), times = await self._generator.generate([row], parameters)
            on_sample_finished(index, sample, len(sample.output.prompt_ids) + len(sample.output.response_ids))
            return sample, times

        done = await gather_or_cancel(*(sample_one(index, row) for index, row in enumerate(rows)))
        return [sample for sample, _ in done], _combined_times([times for _, times in done])

    def _add_to_step(self, samples: list[ScoredSample], baselines: list[ScoredSample]) -> DataProto:
        """Return the samples as columns, and keep their rewards and texts for the end of the step."""
        batch = self.lay_out(samples)
        if baselines:
            scores = torch.tensor([sample.reward.score for sample in baselines], dtype=torch.float32)
            batch.batch["reward_baselines"] = scores.repeat_interleave(self._config.actor_rollout_ref.rollout.n)
        self._rewards_of_step += [sample.reward for sample in (*samples, *baselines)]
        if self._config.trainer.rollout_data_dir:
            self._dump_rows += [self.describe(sample) for sample in samples]
        return batch

    def lay_out(self, samples: Sequence[ScoredSample]) -> DataProto:
        """Turn samples into columns; see `to_batch`."""
        rollout = self._config.actor_rollout_ref.rollout
        batch = to_batch(
            samples,
            pad_token_id=self._tokenizer.pad_token_id,
            with_log_probs=rollout.calculate_log_probs,
            with_sampling_masks=rollout.replay_sampling_mask,
        )
        batch.meta_info["temperature"] = rollout.temperature
        return batch

    async def _finish_step(self, step: int) -> dict[str, float]:
        """Check the rewards, put the replicas to sleep, write the samples; return metrics `reward/*`."""
        rewards, self._rewards_of_step = self._rewards_of_step, []
        check_scored(rewards, self._rewards.scorer)
        await self._sleep()
        if self._config.trainer.rollout_data_dir:
            dump_generations(self._config.trainer.rollout_data_dir, step, self._dump_rows)
            self._dump_rows = []
        return reward_metrics(rewards)

    async def sample_validation(self, rows: Sequence[dict[str, Any]]) -> list[ScoredSample]:
        """Return `val_kwargs.n` scored samples for each row; greedy unless `val_kwargs.do_sample`."""
        kwargs = self._config.actor_rollout_ref.rollout.val_kwargs
        temperature = kwargs.temperature if kwargs.do_sample else 0.0
        parameters = {"temperature": temperature, "top_p": kwargs.top_p, "top_k": kwargs.top_k}
        samples, _ = await self._generator.generate([row for row in rows for _ in range(kwargs.n)], parameters)
        check_scored([sample.reward for sample in samples], self._rewards.scorer)
        return samples

    def describe(self, sample: ScoredSample) -> dict[str, Any]:
        """Return one sample as text, for files and tables.

        `score` is the reward. The dapo manager's value of that name, the score without the penalty, is `extra_score`.
        """
        extra = sample.reward.extra
        return {
            "input": decode(self._tokenizer, sample.output.prompt_ids, skip_special_tokens=False),
            "output": decode(self._tokenizer, sample.output.response_ids, skip_special_tokens=True),
            "gts": sample.row["reward_model"].get("ground_truth"),
            "score": sample.reward.score,
            "uid": sample.row["uid"],
            **{renamed_extra(name, extra) if name == "score" else name: value for name, value in extra.items()},
        }

    # ---- prompts that partial rollouts carry over ----

    def _single_prompts(self) -> Iterator[Prompt]:
        while True:
            before = self._source.state.loader
            draw = self._source.draw()
            (row,) = draw.rows
            yield Prompt(row, PromptId(draw.state.draws, before["epoch"], before["samples"]))

    def prompt_counts(self) -> PromptCounts | None:
        """Return the numbers of prompts; None if none continues after its step."""
        return None if self._carried is None else PromptCounts(self._carried.finished, self._carried.carried)

    def carried_prompts(self) -> list[PromptId]:
        """Return the prompts that were drawn and not yet trained on."""
        return [] if self._carried is None else self._carried.prompt_ids()

    def resume_prompts(self, prompts: Sequence[PromptId]) -> None:
        """Continue with the prompts that an earlier run had in progress."""
        if self._carried is not None:
            self._carried.resume([Prompt(self._source.read(prompt), prompt) for prompt in prompts])
        elif prompts:
            logger.warning(
                "the checkpoint has %d prompts in progress; they are skipped because this run carries no prompts over "
                "(actor_rollout_ref.rollout.partial_rollout, async_training)",
                len(prompts),
            )

    async def close(self) -> None:
        """Cancel the prompts that are carried over."""
        if self._carried is not None:
            await self._carried.close()


def _combined_times(times: Sequence[GenerationTimes]) -> GenerationTimes:
    return GenerationTimes(
        min(each.started for each in times),
        max(each.generated for each in times),
        max(each.scored for each in times),
    )
