"""Run agent loops over rows, score each sample as soon as it is finished, and turn samples into columns."""

from __future__ import annotations

import logging
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from verl.agent_loop.agent_loop import AgentLoopOutput, LoopFactory
from verl.agent_loop.detokenize import decode
from verl.agent_loop.loop_pool import LoopPool
from verl.agent_loop.loops_file import register_from_file
from verl.agent_loop.manager_rewards import ManagerRewards
from verl.agent_loop.padding import pad_right, pad_samples
from verl.config import PPOConfig
from verl.config.names import REWARD_MANAGERS
from verl.protocol import DataProto
from verl.timeline.spans import spanned
from verl.utils.asyncio_utils import gather_or_cancel
from verl.utils.proto_columns import object_array
from verl.utils.sampling_masks import COLUMN as SAMPLING_MASKS
from verl.workers.reward import RewardLoop, RewardResult, extra_columns
from verl.workers.reward.function import BadReturnError, read_return
from verl.workers.rollout.client import LLMServerClient

logger = logging.getLogger(__name__)


@dataclass
class ScoredSample:
    """A generated sample with its row and its reward."""

    row: dict[str, Any]
    output: AgentLoopOutput
    reward: RewardResult


class GenerationTimes(NamedTuple):
    """Times in `time.monotonic_ns`: at the start, after the last response, and after the last score."""

    started: int
    generated: int
    scored: int


class SampleGenerator:
    """Generates and scores one sample per row.

    Args:
        client: access to the replicas.
        tokenizer: the model's tokenizer.
        rewards: scores a sample in another process.
        config: the whole config.

    Raises:
        ValueError: the default agent loop is unknown or does not support the config, or the loops file is invalid; or
            the user's reward manager cannot be constructed.
    """

    def __init__(self, client: LLMServerClient, tokenizer: Any, rewards: RewardLoop, config: PPOConfig):
        self._tokenizer = tokenizer
        self._rewards = rewards
        self._manager = None
        if config.reward.reward_manager.name not in REWARD_MANAGERS:
            self._manager = ManagerRewards(config, tokenizer, rewards)
        agent = config.actor_rollout_ref.rollout.agent
        self._default_agent_loop = agent.default_agent_loop
        self._pool = LoopPool(client, config) if agent.num_workers else None
        self._loops: LoopFactory | None = None
        if self._pool is None:
            if agent.agent_loop_config_path is not None:
                register_from_file(agent.agent_loop_config_path)
            self._loops = LoopFactory(client, tokenizer, config)

    async def start(self) -> None:
        """Wait for the processes of the agent loops, if there are any.

        Raises:
            ValueError: the default agent loop is unknown or does not support the config, or the loops file is invalid.
        """
        if self._pool is not None:
            await self._pool.start()

    async def generate(
        self, rows: Sequence[dict[str, Any]], sampling_params: dict[str, Any]
    ) -> tuple[list[ScoredSample], GenerationTimes]:
        """Generate one sample per row. For `n` samples of a row, pass it `n` times.

        Returns:
            The samples in the order of the rows, and the times of the call.
        """
        started = time.monotonic_ns()
        self._generated_at = started
        samples = await gather_or_cancel(*(self._sample(row, sampling_params) for row in rows))
        return list(samples), GenerationTimes(started, self._generated_at, time.monotonic_ns())

    @spanned("sample", "sample", overlaps=True)
    async def _sample(self, row: dict[str, Any], sampling_params: dict[str, Any]) -> ScoredSample:
        output = await self._run_loop(row.get("agent_name") or self._default_agent_loop, sampling_params, row)
        self._generated_at = time.monotonic_ns()
        extra_info = {**(row.get("extra_info") or {}), **output.extra_fields, "num_turns": output.num_turns}
        reward: RewardResult
        if output.reward_score is not None:
            reward = self._rewards.record(_own_reward(output.reward_score), row["data_source"])
        elif self._manager is not None:
            reward = await self._manager.score(unscored_table(row, output, extra_info, self._tokenizer.pad_token_id))
            reward = self._rewards.record(reward, row["data_source"])
        else:
            reward = await self._rewards.score(
                row["data_source"],
                decode(self._tokenizer, output.response_ids, skip_special_tokens=True),
                row["reward_model"].get("ground_truth"),
                extra_info,
                response_length=len(output.response_ids),
                raw_prompt=row["raw_prompt"],
            )
        return ScoredSample(row, output, reward)

    async def _run_loop(self, name: str, sampling_params: dict[str, Any], row: dict[str, Any]) -> AgentLoopOutput:
        if self._pool is not None:
            return await self._pool.run(name, sampling_params, row)
        assert self._loops is not None
        return await self._loops.make(name).run(sampling_params, **row)

    def close(self) -> None:
        """End the processes of the agent loops."""
        if self._pool is not None:
            self._pool.close()


def _own_reward(score: Any) -> RewardResult:
    """Return the reward that an agent loop computed itself."""
    try:
        value, extra, note = read_return(score)
    except BadReturnError as error:
        return RewardResult(0.0, {}, "bad_return", 0.0, f"AgentLoopOutput.reward_score: {error}")
    return RewardResult(value, extra, None, 0.0, note)


def unscored_table(
    row: dict[str, Any], output: AgentLoopOutput, extra_info: dict[str, Any], pad_token_id: int
) -> DataProto:
    """Return a sample as a table of one row without scores, with every column of the data, for a reward manager.

    Args:
        row: the row of the data.
        output: the sample.
        extra_info: of the row, with the fields of the agent loop.
        pad_token_id: padding token.
    """
    table = to_batch(
        [ScoredSample(row, output, RewardResult(0.0, {}, None, 0.0))], pad_token_id=pad_token_id, with_log_probs=False
    )
    table.pop(["token_level_scores"], ["reward_error"])
    columns = {**row, "extra_info": extra_info, "__num_turns__": output.num_turns}
    table.non_tensor_batch |= {name: object_array([value]) for name, value in columns.items()}
    return table


def to_batch(
    samples: Sequence[ScoredSample], *, pad_token_id: int, with_log_probs: bool, with_sampling_masks: bool = False
) -> DataProto:
    """Turn samples into columns; pad prompts on the left and responses on the right to the longest of the batch.

    Args:
        samples: at least one.
        pad_token_id: padding token of prompts and responses.
        with_log_probs: add the column `rollout_log_probs`.
        with_sampling_masks: add the column `sampling_masks`.

    Returns:
        Columns `prompts` [B, P], `responses` [B, T], `input_ids`, `attention_mask`, `position_ids` [B, P + T],
        `response_mask` [B, T] int64; `rollout_log_probs` [B, T] float32; `weight_versions` [B, T] int64, -1 without a
        model token; `token_level_scores` [B, T] float32 with the score at the model's last token. Object columns
        [B] of the rows, of the rewards' extra values and of the loops' extra fields, None if a sample has none;
        `sampling_masks` holds a `SamplingMasks` of each response.

    Raises:
        ValueError: an extra value or field has the same name as another column, or an agent loop returned no sampling
            masks or wrong ones.
    """
    outputs = [sample.output for sample in samples]
    columns = pad_samples([out.prompt_ids for out in outputs], [out.response_ids for out in outputs], pad_token_id)
    width = columns["responses"].shape[1]
    scores = np.zeros((len(samples), width), np.float32)
    for row, sample in zip(scores, samples, strict=True):
        row[_last_model_token(sample.output.response_mask)] = sample.reward.score
    columns |= {
        "response_mask": pad_right([out.response_mask for out in outputs], width, 0),
        "weight_versions": pad_right([out.weight_versions for out in outputs], width, -1),
        "token_level_scores": scores,
    }
    if with_log_probs:
        columns["rollout_log_probs"] = pad_right([out.response_logprobs for out in outputs], width, 0, np.float32)
    objects = _object_columns(samples, reserved={*columns, SAMPLING_MASKS})
    if with_sampling_masks:
        for out in outputs:
            _check_sampling_masks(out)
        objects[SAMPLING_MASKS] = object_array([out.sampling_masks for out in outputs])
    return DataProto.from_dict(
        tensors={name: torch.from_numpy(column) for name, column in columns.items()}, non_tensors=objects
    )


def _check_sampling_masks(output: AgentLoopOutput) -> None:
    """Check that each response token has a mask, and that the masks of the model's tokens contain these tokens."""
    tokens, masks = np.array(output.response_ids, np.int64), output.sampling_masks
    cure = (
        "return response.sampling_masks with the response tokens, joined by +, and SamplingMasks.full(number) of "
        "verl.agent_loop for tokens that the model did not generate"
    )
    if len(masks) != len(tokens):
        raise ValueError(
            f"actor_rollout_ref.rollout.replay_sampling_mask=True: an agent loop returned {len(masks)} sampling masks "
            f"for {len(tokens)} response tokens; {cure}"
        )
    excluded = [index for index in masks.excluded(tokens).tolist() if output.response_mask[index]]
    if excluded:
        raise ValueError(
            f"actor_rollout_ref.rollout.replay_sampling_mask=True: the sampling mask of response token {excluded[0]} "
            f"does not contain the token, id {tokens[excluded[0]]}; {cure}, in the order of the tokens"
        )


def _last_model_token(response_mask: Sequence[int]) -> int:
    """Return the index of the model's last token, because estimators skip other tokens; 0 if there is none."""
    return next((i for i in reversed(range(len(response_mask))) if response_mask[i]), 0)


def _object_columns(samples: Sequence[ScoredSample], reserved: Container[str]) -> dict[str, np.ndarray]:
    columns: dict[str, list[Any]] = {
        "uid": [s.row["uid"] for s in samples],
        "data_source": [s.row["data_source"] for s in samples],
        "reward_model": [s.row["reward_model"] for s in samples],
        "extra_info": [s.row.get("extra_info") or {} for s in samples],
        "index": [s.row.get("index") for s in samples],
        "raw_prompt": [s.row["raw_prompt"] for s in samples],
        "stop_reason": [s.output.stop_reason for s in samples],
        "num_turns": [s.output.num_turns for s in samples],
        "reward_error": [s.reward.error for s in samples],
    }
    if any(s.output.metrics for s in samples):
        columns["agent_loop_metrics"] = [dict(s.output.metrics) for s in samples]
    fields = [s.output.extra_fields for s in samples]
    loop_columns = {
        key: [field.get(key) for field in fields] for key in dict.fromkeys(key for f in fields for key in f)
    }
    reward_columns = extra_columns([s.reward for s in samples])
    for source, extra in (("the agent loop", loop_columns), ("the reward function", reward_columns)):
        taken = sorted(name for name in extra if name in columns or name in reserved)
        if taken:
            raise ValueError(
                f"duplicate name: {source} returns {', '.join(taken)}, which the batch already has; choose another name"
            )
        columns |= extra
    return {name: object_array(values) for name, values in columns.items()}
