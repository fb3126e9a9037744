"""Responses in parts: sampling parameters of the next part, and joining of the parts by the client."""

import asyncio

import numpy as np
import pytest

from verl.utils.sampling_masks import SamplingMasks
from verl.workers.rollout.client import LLMServerClient
from verl.workers.rollout.continuation import after_cut, check_continuable
from verl.workers.rollout.types import NoReplicaLeft, ReplicaUnavailable, TokenOutput

SAMPLING = {"temperature": 1.0, "max_tokens": 10, "logprobs": 0}


def test_limits_of_the_rest_of_a_response():
    assert after_cut({"max_tokens": 10, "min_tokens": 6}, 4) == {"max_tokens": 6, "min_tokens": 2}
    assert after_cut({"max_tokens": 10, "min_tokens": 6}, 8) == {"max_tokens": 2, "min_tokens": 0}
    kept = {"max_tokens": 10, "stop_token_ids": [3], "temperature": 0.7, "top_p": 0.9}
    assert after_cut(kept, 4) == {**kept, "max_tokens": 6}
    assert after_cut(kept, 0) == kept


def test_the_seed_changes_reproducibly_after_each_cut():
    seeds = [after_cut({"max_tokens": 10, "seed": 5}, cut)["seed"] for cut in range(5)]
    assert seeds[0] == 5 and len(set(seeds)) == 5
    assert seeds == [after_cut({"max_tokens": 10, "seed": 5}, cut)["seed"] for cut in range(5)]
    assert "seed" not in after_cut({"max_tokens": 10}, 3)


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty", "structured_outputs", "n"])
def test_parameters_with_state_are_refused(name):
    check_continuable(SAMPLING)
    with pytest.raises(ValueError, match=rf"{name}: .*partial_rollout=False"):
        check_continuable({**SAMPLING, name: 1})


class Counting:
    """Replica that returns the position of each token as the token, a few at a time, until it is cut or dies."""

    def __init__(self, rank, script):
        self.rank, self.script, self.alive, self.in_flight = rank, script, True, 0
        self.asked = []

    async def generate(self, prompt_ids, sampling_params, request_id, answered):
        self.asked.append(list(answered))
        await asyncio.sleep(0)
        what, count, version = self.script.pop(0)
        if what == "dies":
            self.alive = False
            raise ReplicaUnavailable(f"replica {self.rank} died")
        if what == "refuses":
            raise ReplicaUnavailable(f"replica {self.rank} refuses")
        tokens = list(range(len(answered), len(answered) + count))
        # Every token is the only one in its mask.
        masks = SamplingMasks(np.array(tokens, np.int32), np.ones(count, np.int32))
        return TokenOutput(tokens, [-float(token) for token in tokens], what, [version] * count, masks)


class Pool:
    def __init__(self, *replicas):
        self.replicas, self.recovery = list(replicas), None

    @property
    def serving(self):
        return [replica for replica in self.replicas if replica.alive]


async def test_the_parts_form_one_response():
    replica = Counting(0, [("abort", 3, 1), ("abort", 0, 2), ("abort", 2, 3), ("length", 4, 5)])
    client = LLMServerClient(Pool(replica))
    output = await client.generate([7], SAMPLING)
    assert output.token_ids == list(range(9))
    assert output.log_probs == [-float(token) for token in range(9)]
    assert output.weight_versions == [1, 1, 1, 3, 3, 5, 5, 5, 5]
    assert output.sampling_masks.ids.tolist() == list(range(9)) and output.sampling_masks.counts.tolist() == [1] * 9
    assert output.stop_reason == "length" and client.cuts == 3
    assert [len(answered) for answered in replica.asked] == [0, 3, 3, 5]


async def test_another_replica_continues_from_the_last_cut():
    first, second = Counting(0, [("abort", 3, 1), ("dies", 0, 0)]), Counting(1, [("stop", 2, 2)])
    client = LLMServerClient(Pool(first, second))
    output = await client.generate([7], SAMPLING, session="s")
    assert output.token_ids == list(range(5)) and output.weight_versions == [1, 1, 1, 2, 2]
    assert second.asked == [[0, 1, 2]] and client.retries == 1


async def test_a_replica_that_refused_is_tried_again_after_an_update():
    first = Counting(0, [("refuses", 0, 0), ("stop", 1, 2)])
    second = Counting(1, [("abort", 2, 1), ("dies", 0, 0)])
    output = await LLMServerClient(Pool(first, second)).generate([7], SAMPLING)
    assert output.weight_versions == [1, 1, 2]
    with pytest.raises(NoReplicaLeft, match="refuses"):
        await LLMServerClient(Pool(Counting(0, [("refuses", 0, 0)]))).generate([7], SAMPLING)


async def test_a_death_is_reported_once_for_all_requests(caplog):
    first = Counting(0, [("dies", 0, 0)] * 5)
    pool = Pool(first, Counting(1, [("stop", 1, 2)] * 5))
    client = LLMServerClient(pool)
    # All requests reach the first one before it dies.
    first.in_flight = -100
    await asyncio.gather(*(client.generate([7], SAMPLING) for _ in range(5)))
    assert caplog.messages == ["replica 0 died; its requests are sent to 1 other replica(s)"]
    caplog.clear()
    with pytest.raises(NoReplicaLeft, match=r"none of 1 replica\(s\) responds: replica 0 died"):
        await LLMServerClient(Pool(Counting(0, [("dies", 0, 0)]))).generate([7], SAMPLING)
    assert caplog.messages == ["replica 0 died; there is no other replica"]
