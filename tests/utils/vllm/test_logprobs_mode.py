"""vLLM's sampler, built without a mode as in vllm-ascend, after `apply_logprobs_mode`."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.sample.sampler import Sampler

from verl.utils.vllm.logprobs_mode import apply_logprobs_mode


def returned(sampler, logits):
    """The log-probabilities that the sampler returns for requests with top_k=3."""
    return sampler.topk_topp_sampler.forward_native(logits.clone(), {}, torch.full((len(logits),), 3), None)[1]


def test_a_sampler_without_the_mode_returns_processed_log_probs_afterwards():
    logits = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    runner = SimpleNamespace(sampler=Sampler())
    assert runner.sampler.logprobs_mode == "raw_logprobs" and returned(runner.sampler, logits) is None
    apply_logprobs_mode(runner, "processed_logprobs")
    assert runner.sampler.logprobs_mode == "processed_logprobs"
    best = logits.topk(3)
    expected = torch.full_like(logits, -torch.inf).scatter(1, best.indices, best.values.log_softmax(-1))
    torch.testing.assert_close(returned(runner.sampler, logits), expected)


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_a_sampler_with_the_mode_keeps_it(mode):
    sampler = Sampler(logprobs_mode=mode)
    apply_logprobs_mode(SimpleNamespace(sampler=sampler), mode)
    assert sampler.logprobs_mode == sampler.topk_topp_sampler.logprobs_mode == mode


def test_a_runner_without_a_sampler_is_left_alone():
    """Does not raise."""
    apply_logprobs_mode(SimpleNamespace(), "processed_logprobs")
    apply_logprobs_mode(SimpleNamespace(sampler=None), "processed_logprobs")
