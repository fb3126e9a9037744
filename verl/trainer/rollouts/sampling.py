"""Everything that the replicas answer: the batch of a step, and a validation's samples."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from typing import Any

import torch

from verl.agent_loop.generation import GenerationTimes, SampleGenerator, ScoredSample, to_batch
from verl.config import PPOConfig
from verl.protocol import DataProto
from verl.trainer.ppo.validation import dump_generations
from verl.trainer.rollouts.dynamic_sampling import GroupFilter
from verl.trainer.rollouts.partial_rollout import Position, Prompt, carried_groups, staleness_metrics
from verl.trainer.rollouts.pipeline import Generated
from verl.trainer.rollouts.prompts import Place, PromptSource
from verl.utils.asyncio_utils import gather_or_cancel
from verl.utils.timeline import spanned
from verl.utils.timing import add_stage, marked_timer
from verl.workers.reward import RewardLoop, RewardResult
from verl.workers.reward.counts import check_scored, reward_metrics

logger = logging.getLogger(__name__)

# Told of a sample that has finished: its row in the batch, the sample, its tokens with the prompt's.
Arrived = Callable[[int, ScoredSample, int], None]
# Samples of rows, greedy answers to them where the estimator compares; each with its times.
Answers = tuple[tuple[list[ScoredSample], GenerationTimes], tuple[list[ScoredSample], GenerationTimes | None]]


class Sampling:
    """Rows in, scored samples out, as the config wants them sampled.

    Args:
        config: the whole config.
        generator: runs agent loops over rows.
        source: of the training prompts.
        rewards: whose scorer is named when it always fails.
        sleep: lets the replicas give their memory to the trainer.
        with_baselines: the estimator compares with a greedy answer to each prompt.
        total_steps: of the run.
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
    ):
        self._config, self._generator, self._source, self._rewards = config, generator, source, rewards
        self._tokenizer, self._sleep, self._with_baselines = tokenizer, sleep, with_baselines
        self._total_steps = total_steps
        self._carried = carried_groups(config, lambda row: self._answers([row]))
        self._prompts = self._single_prompts()
        self._scored: list[RewardResult] = []
        self._dump: list[dict[str, Any]] = []

    async def generate(
        self, step: int, timing: MutableMapping[str, float], arrived: Arrived | None = None
    ) -> Generated:
        """`train_batch_size` prompts with `rollout.n` scored samples each, next to each other.

        Where the estimator compares with a greedy answer, that answer's score is the column `reward_baselines` [B].
        With `filter_groups` from as many draws of prompts as that takes; with partial rollouts those prompts that are
        done first, while the others go on. In the end the replicas sleep where the trainer needs their memory.

        Args:
            step: which trains on them.
            timing: gets `gen`, until the last answer, and `reward`, from there until the last score.
            arrived: told of each sample as it finishes.

        Raises:
            RewardError: every sample of the step failed to be scored.
            DynamicSamplingError: not enough groups whose samples differ.
        """
        if self._config.algorithm.filter_groups.enable:
            batch, metrics, behind = await self._filtered(step, timing)
        elif self._carried is not None:
            batch, metrics, behind = await self._partial(step, timing)
        else:
            draw = await self._source.next()
            batch, metrics, behind = await self._of_rows(draw.rows, step, timing, arrived), {}, draw.behind
        batch.meta_info["global_step"] = step
        return Generated(batch, metrics | await self._end(step), behind)

    async def _filtered(
        self, step: int, timing: MutableMapping[str, float]
    ) -> tuple[DataProto, dict[str, float], Place]:
        groups = GroupFilter(
            self._config.algorithm.filter_groups,
            train_batch_size=self._config.data.train_batch_size,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        behind = self._source.position
        while not groups.full:
            draw = await self._source.next()
            groups.add(await self._of_rows(draw.rows, step, timing, None))
            behind = draw.behind
        return groups.take(), groups.metrics(), behind

    async def _partial(
        self, step: int, timing: MutableMapping[str, float]
    ) -> tuple[DataProto, dict[str, float], Place]:
        assert self._carried is not None
        with marked_timer("gen", timing, step=step):
            groups = await self._carried.take(step, self._total_steps - step + 1, self._prompts)
        batch = self._finished(
            [sample for (samples, _), _ in groups for sample in samples],
            [baseline for _, (baselines, _) in groups for baseline in baselines],
        )
        carried = {"partial_rollout/carried_prompts": float(len(self._carried.positions()))}
        return batch, staleness_metrics(batch, step - 1) | carried, self._source.position

    @spanned("generate")
    async def _of_rows(
        self, rows: Sequence[dict[str, Any]], step: int, timing: MutableMapping[str, float], arrived: Arrived | None
    ) -> DataProto:
        (samples, times), (baselines, greedy_times) = await self._answers(rows, arrived)
        both = _earliest_to_last([times, greedy_times or times])
        add_stage("gen", timing, both.started, both.answered, step=step)
        add_stage("reward", timing, both.answered, both.ended, step=step)
        return self._finished(samples, baselines)

    async def _answers(self, rows: Sequence[dict[str, Any]], arrived: Arrived | None = None) -> Answers:
        rollout = self._config.actor_rollout_ref.rollout
        sampling = {"temperature": rollout.temperature, "top_p": rollout.top_p, "top_k": rollout.top_k}
        if rollout.calculate_log_probs:
            sampling["logprobs"] = 0
        repeated = [row for row in rows for _ in range(rollout.n)]
        sampled = (
            self._one_by_one(repeated, sampling, arrived) if arrived else self._generator.generate(repeated, sampling)
        )
        greedy = self._generator.generate(list(rows), {"temperature": 0.0}) if self._with_baselines else _nothing()
        return await gather_or_cancel(sampled, greedy)

    async def _one_by_one(
        self, rows: Sequence[dict[str, Any]], sampling: dict[str, Any], arrived: Arrived
    ) -> tuple[list[ScoredSample], GenerationTimes]:
        async def one(place: int, row: dict[str, Any]) -> tuple[ScoredSample, GenerationTimes]:
            (sample,), times = await self._generator.generate([row], sampling)
            arrived(place, sample, len(sample.output.prompt_ids) + len(sample.output.response_ids))
            return sample, times

        done = await gather_or_cancel(*(one(place, row) for place, row in enumerate(rows)))
        times = [times for _, times in done]
        return [sample for sample, _ in done], _earliest_to_last(times)

    def _finished(self, samples: list[ScoredSample], baselines: list[ScoredSample]) -> DataProto:
        """The samples as columns, noted for the end of the step."""
        batch = self.lay_out(samples)
        if baselines:
            scores = torch.tensor([sample.reward.score for sample in baselines], dtype=torch.float32)
            batch.batch["reward_baselines"] = scores.repeat_interleave(self._config.actor_rollout_ref.rollout.n)
        self._scored += [sample.reward for sample in (*samples, *baselines)]
        if self._config.trainer.rollout_data_dir:
            self._dump += [self.describe(sample) for sample in samples]
        return batch

    def lay_out(self, samples: Sequence[ScoredSample]) -> DataProto:
        """Samples as columns; see `to_batch`."""
        rollout = self._config.actor_rollout_ref.rollout
        batch = to_batch(samples, pad_token_id=self._tokenizer.pad_token_id, with_log_probs=rollout.calculate_log_probs)
        batch.meta_info["temperature"] = rollout.temperature
        return batch

    async def _end(self, step: int) -> dict[str, float]:
        """Judge the rewards, put the replicas to sleep, dump what they said; metrics `reward/*`."""
        scored, self._scored = self._scored, []
        check_scored(scored, self._rewards.scorer)
        await self._sleep()
        if self._config.trainer.rollout_data_dir:
            dump_generations(self._config.trainer.rollout_data_dir, step, self._dump)
            self._dump = []
        return reward_metrics(scored)

    async def validation(self, rows: Sequence[dict[str, Any]]) -> list[ScoredSample]:
        """`val_kwargs.n` scored samples for each row; greedy unless `val_kwargs.do_sample`."""
        kwargs = self._config.actor_rollout_ref.rollout.val_kwargs
        temperature = kwargs.temperature if kwargs.do_sample else 0.0
        sampling = {"temperature": temperature, "top_p": kwargs.top_p, "top_k": kwargs.top_k}
        samples, _ = await self._generator.generate([row for row in rows for _ in range(kwargs.n)], sampling)
        check_scored([sample.reward for sample in samples], self._rewards.scorer)
        return samples

    def describe(self, sample: ScoredSample) -> dict[str, Any]:
        """One sample as text, for dumps and tables."""
        return {
            "input": self._tokenizer.decode(sample.output.prompt_ids, skip_special_tokens=False),
            "output": self._tokenizer.decode(sample.output.response_ids, skip_special_tokens=True),
            "gts": sample.row["reward_model"].get("ground_truth"),
            "score": sample.reward.score,
            **sample.reward.extra,
        }

    # ---- what partial rollouts carry over ----

    def _single_prompts(self) -> Iterator[Prompt]:
        while True:
            here = self._source.position.loader
            draw = self._source.draw()
            (row,) = draw.rows
            yield Prompt(row, Position(draw.behind.draws, here["epoch"], here["samples"]))

    def carried(self) -> list[Position]:
        """Where the prompts stand that were drawn and not yet trained on."""
        return [] if self._carried is None else self._carried.positions()

    def carry(self, positions: Sequence[Position]) -> None:
        """Go on with what another run had under way."""
        if self._carried is not None:
            self._carried.resume([Prompt(self._source.read(*position), position) for position in positions])
        elif positions:
            logger.warning("%d prompts that partial rollouts had under way are left out", len(positions))

    async def close(self) -> None:
        """End what goes on beyond a step."""
        if self._carried is not None:
            await self._carried.close()


async def _nothing() -> tuple[list[ScoredSample], None]:
    return [], None


def _earliest_to_last(times: Sequence[GenerationTimes]) -> GenerationTimes:
    return GenerationTimes(
        min(each.started for each in times), max(each.answered for each in times), max(each.ended for each in times)
    )
