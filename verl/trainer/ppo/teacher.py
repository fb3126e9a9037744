"""The teacher of on-policy distillation: engines of its own that score the policy's samples."""

from __future__ import annotations

import torch

from verl.protocol import DataProto
from verl.timeline.spans import spanned
from verl.trainer.rollouts.forward_passes import RankRows
from verl.utils.asyncio_utils import gather_or_cancel
from verl.workers.rollout.client import LLMServerClient
from verl.workers.rollout.replica import ReplicaSet

COLUMN = "teacher_log_probs"
# vLLM returns the log-probability of each prompt token, and has to generate at least one.
_SCORING = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}


class Teacher:
    """Scores samples.

    Args:
        replicas: engines of the teacher model, running when the first sample is scored. A dead one is restarted before
            the next batch.
    """

    def __init__(self, replicas: ReplicaSet):
        self._replicas, self._client = replicas, LLMServerClient(replicas)

    @spanned("teacher scores")
    async def score(self, batch: DataProto, rank_rows: RankRows = None) -> DataProto:
        """Return `teacher_log_probs` [B, T] float32 of the responses, 0 where attention_mask is 0.

        Args:
            batch: input_ids, attention_mask [B, P+T], responses [B, T].
            rank_rows: not used; the engines divide the samples among them.

        Raises:
            NoReplicaLeft: every engine of the teacher is dead.
        """
        await self._replicas.restart_dead()
        columns = batch.batch
        assert columns is not None, "a batch has tensor columns"
        attended, width = columns["attention_mask"].bool(), columns["responses"].shape[1]
        scores = await gather_or_cancel(
            *(self._score(ids[mask].tolist()) for ids, mask in zip(columns["input_ids"], attended, strict=True))
        )
        # The first token of a sample has no log-probability; it belongs to the prompt.
        log_probs = torch.zeros(attended.shape)
        log_probs[attended] = torch.tensor([value for values in scores for value in (0.0, *values)])
        return DataProto.from_dict(tensors={COLUMN: log_probs[:, attended.shape[1] - width :].contiguous()})

    async def _score(self, token_ids: list[int]) -> list[float]:
        output = await self._client.generate(token_ids, _SCORING)
        return output.prompt_log_probs
