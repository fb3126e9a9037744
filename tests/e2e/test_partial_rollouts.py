"""Partial rollouts: responses that weight updates interrupt equal uninterrupted ones, each token under its weights."""

import asyncio
import json
from collections import Counter

import pytest
import torch
from e2e.test_replicas import PROMPT, Sender, replica
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fixtures.tiny import write_tiny_model
from fixtures.training import TinyRun
from verl.workers.rollout.client import LLMServerClient
from verl.workers.rollout.replica import ReplicaSet
from verl.workers.weight_sync.driver import update_weights

pytestmark = pytest.mark.e2e

LONGEST = 1500
GREEDY = {"temperature": 0.0, "logprobs": 0, "ignore_eos": True, "max_tokens": LONGEST}


def reference(model_dir, tokens):
    """Log-probability [len(tokens)] of each token, given `PROMPT` and the tokens before it."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    ids = torch.tensor([[*PROMPT, *tokens]])
    with torch.no_grad():
        log_probs = torch.log_softmax(model(ids).logits[0].double(), -1)
    return log_probs[len(PROMPT) - 1 : -1].gather(1, ids[0, len(PROMPT) :, None])[:, 0].float()


class Rollout:
    """One replica whose weights are replaced while it generates."""

    def __init__(self, pool, model_dirs):
        self.pool, self.client = pool, LLMServerClient(pool)
        self.weights = [load_file(each / "model.safetensors") for each in model_dirs]
        self.version = 0

    async def update(self):
        self.version += 1
        weights = self.weights[self.version % len(self.weights)]
        await update_weights(Sender(weights), self.pool.alive, self.version)

    async def cut(self, sampling, times=4):
        """Return a response that was cut at least `times` times, with at least ten tokens between the cuts."""
        response = asyncio.ensure_future(self.client.generate(PROMPT, sampling))
        for _ in range(times):
            # The engine generates both at the same time: ten tokens here are ten more tokens there.
            await self.client.generate(PROMPT, {"max_tokens": 10, "ignore_eos": True})
            await self.update()
        return await response


async def test_a_response_cut_by_updates_equals_an_uncut_one(tmp_path, ray_session):
    size = {"max_position_embeddings": 2048}
    model_dirs = [write_tiny_model(tmp_path / str(seed), seed=seed, **size) for seed in range(2)]
    server = replica(0, model_dirs[0], partial_rollout=True, response_length=LONGEST)
    pool = ReplicaSet([server])
    same = Rollout(pool, model_dirs[:1])
    try:
        await pool.start()
        await same.update()

        # With the same weights, the response equals the uncut one token by token.
        uncut = await same.client.generate(PROMPT, GREEDY)
        cut = await same.cut(GREEDY)
        assert same.client.cuts >= 4 and len(set(cut.weight_versions)) >= 4, "the response was not cut"
        assert cut.token_ids == uncut.token_ids and cut.stop_reason == uncut.stop_reason == "length"
        assert len(cut.token_ids) == len(cut.log_probs) == LONGEST
        assert (torch.tensor(cut.log_probs) - torch.tensor(uncut.log_probs)).abs().max() < 1e-4

        # Stop tokens and the minimum number of tokens apply to the complete response, not to its parts.
        stops = {"temperature": 1.0, "stop_token_ids": list(range(0, 128, 2)), "min_tokens": 1000, "seed": 3}
        stopped = await same.cut({**stops, "max_tokens": LONGEST})
        assert len(set(stopped.weight_versions)) >= 3
        assert all(token % 2 for token in stopped.token_ids[:1000])
        # Every second token is a stop token: forty more are enough, unless the count restarted at the last cut.
        assert 1000 < len(stopped.token_ids) < 1040
        assert stopped.stop_reason == "stop" and stopped.token_ids[-1] % 2 == 0

        # With other weights at every update, each token comes from its recorded version, keys and values included.
        other = Rollout(pool, model_dirs)
        other.version = same.version
        response = await other.cut({**GREEDY, "temperature": 1.0})
        versions = torch.tensor(response.weight_versions)
        assert len(versions) == LONGEST and (versions.diff() >= 0).all() and len(set(response.weight_versions)) >= 3
        # The response began under the last update of `same`, which sent model 0.
        of = [0 if version <= same.version else version % 2 for version in response.weight_versions]
        expected = torch.stack([reference(each, response.token_ids) for each in model_dirs])
        chosen = expected[torch.tensor(of), torch.arange(LONGEST)]
        wrong = expected[1 - torch.tensor(of), torch.arange(LONGEST)]
        assert (torch.tensor(response.log_probs) - chosen).abs().max() < 1e-3
        assert (torch.tensor(response.log_probs) - wrong).abs().median() > 1e-2

        # A sampling parameter that cannot continue after a cut is rejected at the first request.
        with pytest.raises(ValueError, match=r"presence_penalty.*partial_rollout=False"):
            await other.client.generate(PROMPT, {"presence_penalty": 1.0})
    finally:
        await pool.stop()


def prompts_of(directory):
    """For each step, how many samples of each prompt it trained on."""
    return {
        int(path.stem): Counter(json.loads(line)["input"] for line in path.read_text().splitlines())
        for path in directory.glob("*.jsonl")
    }


def test_carried_prompts_are_trained_on_later_and_after_a_resume(tmp_path, ray_address):
    run = TinyRun(tmp_path, ray_address)
    changes = {
        "data__gen_batch_size": 12,
        "actor_rollout_ref__rollout__partial_rollout": True,
        "actor_rollout_ref__rollout__max_staleness": 1,
        "algorithm__rollout_correction__rollout_is": "token",
        "trainer__total_training_steps": 3,
        "trainer__save_freq": 1,
        "trainer__test_freq": 1,
    }
    run.run(**changes, trainer__rollout_data_dir=tmp_path / "whole")
    metrics = run.metrics()
    # The last step carries no prompt over: it starts no more than it needs.
    assert [metrics[step]["partial_rollout/carried_prompts"] for step in (1, 2, 3)] == [4, 4, 0]
    assert metrics[1]["partial_rollout/staleness/max"] == 0
    assert metrics[3]["partial_rollout/staleness/max"] == 1, "the prompts carried over by step 2 reach the bound"
    assert all(any(name.startswith("val-core/") for name in metrics[step]) for step in (1, 2, 3))

    whole = prompts_of(tmp_path / "whole")
    trained = sum(whole.values(), Counter())
    assert len(trained) == 24 and set(trained.values()) == {4}
    assert all(len(prompts) == 8 for prompts in whole.values())

    # Resume after step 1: its four carried prompts are generated again, and the data continues after them.
    run.run(
        **changes,
        trainer__rollout_data_dir=tmp_path / "resumed",
        trainer__resume_mode="resume_path",
        trainer__resume_from_path=run.out / "global_step_1",
    )
    resumed = prompts_of(tmp_path / "resumed")
    assert sorted(resumed) == [2, 3]
    assert whole[1] + resumed[2] + resumed[3] == trained
