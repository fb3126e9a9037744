"""Sampling masks from the log-probabilities of an engine, compared with truncations by loops."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.logprobs import FlatLogprobs
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

from verl.utils.sampling_masks import candidates_for_top_k
from verl.utils.vllm.sampling_replay import SamplingReplay

VOCAB = 200


def completion(log_probs, sampled, candidates):
    """vLLM's completion whose processed log-probabilities are `log_probs` [T, V]."""
    flat = FlatLogprobs()
    for row, token in zip(log_probs, sampled, strict=True):
        best = row.topk(candidates)
        ids, values = [token, *best.indices.tolist()], [row[token].item(), *best.values.tolist()]
        flat.append_fast(ids, values, range(candidates + 1), [None] * (candidates + 1))
    return SimpleNamespace(logprobs=flat, token_ids=sampled)


def truncated(logits, top_k, top_p):
    rows = len(logits)
    k = torch.full((rows,), min(top_k, VOCAB)) if top_k else None
    p = torch.full((rows,), top_p) if top_p < 1 else None
    return apply_top_k_top_p_pytorch(logits.clone(), k, p).log_softmax(-1)


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (40, 0.9), (1, 1.0), (VOCAB, 0.9), (1000, 0.5)])
def test_masks_are_the_tokens_that_vllm_keeps(top_k, top_p):
    logits = torch.randn(30, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    log_probs = truncated(logits, top_k, top_p)
    sampled = log_probs.argmax(-1).tolist()
    replay = SamplingReplay(1000, VOCAB)
    candidates = replay.candidates({"top_k": top_k, "top_p": top_p, "logprobs": 0})
    found, masks = replay.read(completion(log_probs, sampled, candidates), candidates)
    assert found == log_probs.max(-1).values.tolist() and len(masks) == 30
    for index, row in enumerate(log_probs):
        assert set(masks[index : index + 1].ids.tolist()) == set(torch.nonzero(row > -torch.inf).flatten().tolist())
        assert masks.counts[index] == len(masks[index : index + 1].ids)
    assert masks.excluded(np.array(sampled)).size == 0


def test_tokens_that_tie_with_the_last_one_belong_to_the_mask():
    logits = torch.arange(VOCAB).float().neg().unsqueeze(0) / 10
    logits[0, 9:14] = logits[0, 9]
    log_probs = truncated(logits, 10, 1.0)
    replay = SamplingReplay(10, VOCAB)
    _, masks = replay.read(completion(log_probs, [0], 31), 31)
    assert sorted(masks.ids.tolist()) == list(range(14))


def test_more_equal_logits_than_candidates_are_an_error():
    replay = SamplingReplay(10, VOCAB)
    with pytest.raises(ValueError, match="kept more than 31 tokens at a position, because tokens have equal logits"):
        replay.read(completion(truncated(torch.zeros(1, VOCAB), 10, 1.0), [0], 31), 31)
    # Without a token beyond the candidates, the mask is complete.
    _, masks = SamplingReplay(200, VOCAB).read(completion(torch.zeros(1, VOCAB).log_softmax(-1), [0], VOCAB), VOCAB)
    assert masks.counts.tolist() == [VOCAB]


def test_tokens_without_probability_may_be_missing():
    """An NPU keeps every token if the k-th probability is 0 in float32."""
    logits = torch.full((1, VOCAB), -200.0)
    logits[0, 7] = 0.0
    _, masks = SamplingReplay(10, VOCAB).read(completion(logits.log_softmax(-1), [7], 31), 31)
    assert masks.counts.tolist() == [31] and 7 in masks.ids


@pytest.mark.parametrize(
    "sampling",
    [
        {"top_k": 5},  # no log-probabilities, as in validation
        {"logprobs": 0, "top_p": 1.0, "top_k": -1},
        {"logprobs": 0, "temperature": 0.0, "top_k": 5},
        {"logprobs": 0},
    ],
)
def test_other_requests_need_no_mask(sampling):
    assert SamplingReplay(10, VOCAB).candidates(sampling) == 0


def test_the_candidates_are_bounded_by_the_vocabulary():
    replay = SamplingReplay(1000, VOCAB)
    assert replay.candidates({"logprobs": 0, "top_k": 20, "min_p": 0.1}) == candidates_for_top_k(20) == 46
    assert replay.candidates({"logprobs": 0, "top_k": 1000}) == VOCAB


@pytest.mark.parametrize("sampling", [{"top_p": 0.9}, {"min_p": 0.1}, {"top_p": 0.9, "top_k": -1}, {"top_k": 11}])
def test_a_request_without_a_small_top_k_is_an_error(sampling):
    with pytest.raises(ValueError, match=r"with a top_k of 1 to 10, the value of actor_rollout_ref\.rollout\.top_k"):
        SamplingReplay(10, VOCAB).candidates({"logprobs": 0, **sampling})
