"""Sampling masks of a real engine: the trainer computes the log-probabilities of the truncated distribution."""

import numpy as np
import pytest
import torch
from e2e.test_replicas import PROMPT
from transformers import AutoModelForCausalLM

from fixtures.engine_cases import log_prob_program
from fixtures.ranks import run_ranks
from fixtures.tiny import write_tiny_model
from fixtures.training import TinyRun
from verl.agent_loop.agent_loop import AgentLoopOutput
from verl.agent_loop.generation import ScoredSample, to_batch
from verl.config import ModelConfig, RolloutConfig
from verl.utils.asyncio_utils import gather_all
from verl.utils.sampling_masks import SamplingMasks
from verl.workers.engine import MicroBatching
from verl.workers.reward import RewardResult
from verl.workers.rollout.client import LLMServerClient
from verl.workers.rollout.replica import ReplicaSet, vLLMReplica
from verl.workers.rollout.vllm_rollout.engine_args import engine_environment

pytestmark = [pytest.mark.e2e]

TOP_P = {"temperature": 0.8, "top_p": 0.9, "top_k": 60, "logprobs": 0, "ignore_eos": True, "max_tokens": 40}
SAMPLES = 16
REPLAY = {
    "actor_rollout_ref__rollout__replay_sampling_mask": True,
    "actor_rollout_ref__rollout__top_p": 0.9,
    "actor_rollout_ref__rollout__top_k": 40,
}


def masked_replica(model_dir):
    rollout = RolloutConfig(
        replay_sampling_mask=True,
        top_k=TOP_P["top_k"],
        load_format="auto",
        tensor_model_parallel_size=1,
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=16,
    )
    arguments = {
        "rollout": rollout,
        "model": ModelConfig(path=str(model_dir)),
        "device": "cpu",
        "dtype": "float32",
        "prompt_length": 64,
        "response_length": 64,
    }
    environment = engine_environment(device="cpu", threads=1, tensor_parallel_size=1)
    return vLLMReplica(0, arguments, {"num_cpus": 0}, environment)


def trainer_log_probs(model_dir, batch):
    [(log_probs, _)] = run_ranks(1, log_prob_program, str(model_dir), [batch], MicroBatching(size=5), {})
    return log_probs


async def test_the_trainer_agrees_with_the_engine_at_top_p(tmp_path, ray_session):
    model_dir = write_tiny_model(tmp_path / "model", std=0.2)
    pool = ReplicaSet([masked_replica(model_dir)])
    try:
        await pool.start()
        client = LLMServerClient(pool)
        outputs = await gather_all(*(client.generate([*PROMPT, 20 + i], TOP_P) for i in range(SAMPLES)))
        # Requests that need no masks, as in validation, beside those with masks.
        greedy, full = await gather_all(
            client.generate(PROMPT, {"temperature": 0.0, "max_tokens": 4}),
            client.generate(PROMPT, {"temperature": 1.0, "max_tokens": 4, "logprobs": 0, "ignore_eos": True}),
        )
        with pytest.raises(ValueError, match="top_k of 1 to 60"):
            await client.generate(PROMPT, {**TOP_P, "top_k": -1})
    finally:
        await pool.stop()
    assert len(greedy.sampling_masks) == 0 and full.sampling_masks == SamplingMasks.full(4)

    samples = [
        ScoredSample(
            {"uid": str(i), "data_source": "d", "reward_model": {}, "raw_prompt": []},
            AgentLoopOutput(
                prompt_ids=[*PROMPT, 20 + i],
                response_ids=out.token_ids,
                response_mask=[1] * len(out.token_ids),
                response_logprobs=out.log_probs,
                weight_versions=out.weight_versions,
                sampling_masks=out.sampling_masks,
            ),
            RewardResult(1.0, {}, None, 0.0),
        )
        for i, out in enumerate(outputs)
    ]
    batch = to_batch(samples, pad_token_id=0, with_log_probs=True, with_sampling_masks=True)
    batch.meta_info["temperature"] = TOP_P["temperature"]
    engine, mask = batch.batch["rollout_log_probs"], batch.batch["response_mask"].bool()

    masked = trainer_log_probs(model_dir, batch)
    assert (masked - engine)[mask].abs().mean() <= 5e-5
    assert k3(masked, engine)[mask].mean() < 1e-8

    # Without the masks, the trainer's probabilities are those of the engine times the probability that it kept.
    batch.pop(non_tensor_batch_keys=["sampling_masks"])
    plain = trainer_log_probs(model_dir, batch)
    assert (plain - engine)[mask].abs().mean() > 0.03
    assert k3(plain, engine)[mask].mean() > 1e-3
    check_masks(model_dir, outputs, plain - engine)


def k3(log_probs, rollout_log_probs):
    d = (log_probs - rollout_log_probs).double()
    return d.exp() - 1 - d


def check_masks(model_dir, outputs, bias):
    """Compare the masks with a float64 model: which tokens are kept, and which share of the probability.

    Args:
        bias: [B, T] logarithm of the share, as engine and trainer compute it.
    """
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    sizes = []
    for i, out in enumerate(outputs):
        prompt = [*PROMPT, 20 + i]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *out.token_ids]])).logits[0, len(prompt) - 1 : -1]
        for t, row in enumerate(logits / TOP_P["temperature"]):
            best = row.topk(TOP_P["top_k"])
            probs = best.values.softmax(-1)
            expected = best.indices[(probs.cumsum(0) - probs) < TOP_P["top_p"]].tolist()
            found = out.sampling_masks[t : t + 1].ids.tolist()
            # Rounding may decide about the last token.
            assert len(set(found) ^ set(expected)) <= 1
            assert bias[i, t].item() == pytest.approx(row.softmax(-1)[found].sum().log().item(), abs=1e-4)
            sizes.append(len(found))
    assert len(set(sizes)) > 5 and np.mean(sizes) > 2, "the masks hardly differ"


@pytest.mark.parametrize(
    ("changes", "on_policy"),
    [
        ({"actor_rollout_ref__actor__use_kl_loss": True, "actor_rollout_ref__actor__entropy_coeff": 0.01}, True),
        (
            # One mini-batch: bypass mode measures with the weights of the update, which a second one would change.
            {"algorithm__rollout_correction__bypass_mode": True, "actor_rollout_ref__actor__ppo_mini_batch_size": 8},
            True,
        ),
        ({"actor_rollout_ref__rollout__replay_sampling_mask": False}, False),
    ],
    ids=["decoupled", "bypass", "without masks"],
)
def test_a_run_at_top_p_is_on_policy_with_masks_only(tmp_path, ray_address, changes, on_policy):
    run = TinyRun(tmp_path, ray_address)
    run.run(**{**REPLAY, **changes})
    found = [step["rollout_corr/k3_kl"] for step in run.metrics().values()]
    assert ("sampling_mask/kept_tokens/mean" in run.metrics()[1]) is on_policy
    assert len(found) == 2 and all((value < 1e-8) if on_policy else (value > 1e-3) for value in found), found
