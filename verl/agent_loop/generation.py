"""Runs agent loops over a batch of rows, scores each sample as soon as it is finished, and lays them out as columns."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from verl.agent_loop.agent_loop import AgentLoopOutput, get_agent_loop
from verl.protocol import DataProto
from verl.workers.reward import RewardLoop, RewardResult, extra_columns
from verl.workers.rollout.client import LLMServerClient

logger = logging.getLogger(__name__)


@dataclass
class ScoredSample:
    """One generated sample with the row it came from and its reward."""

    row: dict[str, Any]
    output: AgentLoopOutput
    reward: RewardResult


class SampleGenerator:
    """Rows in, scored samples out.

    Args:
        client: access to the replicas.
        tokenizer: the model's tokenizer.
        rewards: scores one sample; runs off the event loop.
        default_agent_loop: the loop for rows without the column `agent_name`.
        response_length: cap in tokens.
    """

    def __init__(
        self,
        client: LLMServerClient,
        tokenizer: Any,
        rewards: RewardLoop,
        *,
        default_agent_loop: str,
        response_length: int,
    ):
        self._client = client
        self._tokenizer = tokenizer
        self._rewards = rewards
        self._default_agent_loop = default_agent_loop
        self._response_length = response_length

    async def generate(
        self, rows: Sequence[dict[str, Any]], sampling_params: dict[str, Any]
    ) -> tuple[list[ScoredSample], dict[str, float]]:
        """One sample for each row, in the rows' order; a row that should give `n` samples comes `n` times.

        Returns:
            The samples; and seconds: `gen` until the last answer, `reward` from there until the last score.
        """
        started = time.perf_counter()
        self._answered_at = started
        tasks = [asyncio.create_task(self._sample(row, sampling_params)) for row in rows]
        try:
            samples = list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
        ended = time.perf_counter()
        return samples, {"gen": self._answered_at - started, "reward": ended - self._answered_at}

    async def _sample(self, row: dict[str, Any], sampling_params: dict[str, Any]) -> ScoredSample:
        loop_class = get_agent_loop(row.get("agent_name") or self._default_agent_loop)
        loop = loop_class(self._client, self._tokenizer, self._response_length)
        output = await loop.run(sampling_params, **row)
        self._answered_at = time.perf_counter()
        reward = await self._rewards.score(
            row["data_source"],
            self._tokenizer.decode(output.response_ids, skip_special_tokens=True),
            row["reward_model"].get("ground_truth"),
            row.get("extra_info") or {},
            response_length=len(output.response_ids),
        )
        return ScoredSample(row, output, reward)


def to_batch(samples: Sequence[ScoredSample], *, pad_token_id: int, with_log_probs: bool) -> DataProto:
    """Lay samples out as columns: prompts padded on the left, responses on the right, to the longest of the batch.

    Args:
        pad_token_id: what padding is filled with.
        with_log_probs: whether `rollout_log_probs` becomes a column.

    Returns:
        Columns `prompts` [B, P], `responses` [B, T], `input_ids`, `attention_mask`, `position_ids` [B, P + T],
        `response_mask` [B, T] int64; `rollout_log_probs` [B, T] float32; `weight_versions` [B, T] int64, -1 where no
        model token stands; `token_level_scores` [B, T] float32 with the score at the last response token.
    """
    size = len(samples)
    prompt_width = max(len(s.output.prompt_ids) for s in samples)
    # At least one column, so that a batch of empty answers still has a shape to compute with.
    response_width = max(1, *(len(s.output.response_ids) for s in samples))
    prompts = np.full((size, prompt_width), pad_token_id, np.int64)
    prompt_mask = np.zeros((size, prompt_width), np.int64)
    responses = np.full((size, response_width), pad_token_id, np.int64)
    answered = np.zeros((size, response_width), np.int64)
    response_mask = np.zeros((size, response_width), np.int64)
    versions = np.full((size, response_width), -1, np.int64)
    log_probs = np.zeros((size, response_width), np.float32)
    scores = np.zeros((size, response_width), np.float32)
    for i, sample in enumerate(samples):
        out = sample.output
        length = len(out.response_ids)
        prompts[i, prompt_width - len(out.prompt_ids) :] = out.prompt_ids
        prompt_mask[i, prompt_width - len(out.prompt_ids) :] = 1
        responses[i, :length] = out.response_ids
        answered[i, :length] = 1
        response_mask[i, :length] = out.response_mask
        versions[i, : len(out.weight_versions)] = out.weight_versions
        log_probs[i, : len(out.response_logprobs)] = out.response_logprobs
        # An empty answer has no last token; its score stands at the first column, outside every mask.
        scores[i, max(0, length - 1)] = sample.reward.score
    attention_mask = np.concatenate([prompt_mask, answered], axis=1)
    columns = {
        "prompts": prompts,
        "responses": responses,
        "input_ids": np.concatenate([prompts, responses], axis=1),
        "attention_mask": attention_mask,
        "position_ids": np.maximum(attention_mask.cumsum(axis=1) - 1, 0),
        "response_mask": response_mask,
        "weight_versions": versions,
        "token_level_scores": scores,
    }
    if with_log_probs:
        columns["rollout_log_probs"] = log_probs
    return DataProto.from_dict(
        tensors={name: torch.from_numpy(column) for name, column in columns.items()},
        non_tensors=_object_columns(samples),
    )


def _object_columns(samples: Sequence[ScoredSample]) -> dict[str, np.ndarray]:
    columns: dict[str, list[Any]] = {
        "uid": [s.row["uid"] for s in samples],
        "data_source": [s.row["data_source"] for s in samples],
        "reward_model": [s.row["reward_model"] for s in samples],
        "extra_info": [s.row.get("extra_info") or {} for s in samples],
        "raw_prompt": [s.row["raw_prompt"] for s in samples],
        "stop_reason": [s.output.stop_reason for s in samples],
        "num_turns": [s.output.num_turns for s in samples],
    }
    columns |= extra_columns([s.reward for s in samples])
    arrays = {}
    for name, values in columns.items():
        array = np.empty(len(values), dtype=object)
        array[:] = values
        arrays[name] = array
    return arrays
