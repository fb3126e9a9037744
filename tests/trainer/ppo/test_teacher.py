"""Scores of the teacher belong to their tokens, whatever the lengths of the samples."""

import asyncio

import torch

from fixtures.engine_cases import make_batch
from verl.trainer.ppo.teacher import Teacher
from verl.workers.rollout.types import ReplicaUnavailable, TokenOutput


class Engine:
    """Scores a token by its id and its position, or is dead."""

    def __init__(self, rank, dies=False):
        self.rank, self.alive, self.in_flight, self.dies = rank, True, 0, dies

    async def generate(self, prompt_ids, sampling_params, request_id, generated):
        assert sampling_params == {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0} and not generated
        await asyncio.sleep(0.001 * (len(prompt_ids) % 3))
        if self.dies:
            self.alive = False
            raise ReplicaUnavailable("dead")
        scores = [-token - position / 100 for position, token in enumerate(prompt_ids)][1:]
        return TokenOutput(token_ids=[0], prompt_log_probs=scores)


class Engines:
    def __init__(self, *replicas):
        self.replicas, self.restarts, self.recovery = replicas, 0, None

    @property
    def serving(self):
        return [replica for replica in self.replicas if replica.alive]

    async def restart_dead(self):
        self.restarts += 1


def expected(batch):
    ids, attention = batch.batch["input_ids"], batch.batch["attention_mask"]
    position = attention.cumsum(1) - 1
    scores = (-ids - position / 100) * (attention * (position > 0))
    return scores[:, -batch.batch["responses"].shape[1] :].float()


def test_each_token_gets_its_score():
    batch, engines = make_batch(12), Engines(Engine(0), Engine(1))
    scores = asyncio.run(Teacher(engines).score(batch)).batch["teacher_log_probs"]
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected(batch))
    assert engines.restarts == 1


def test_a_dead_engine_leaves_its_samples_to_the_other_one():
    batch = make_batch(12)
    scores = asyncio.run(Teacher(Engines(Engine(0, dies=True), Engine(1))).score(batch)).batch["teacher_log_probs"]
    torch.testing.assert_close(scores, expected(batch))
