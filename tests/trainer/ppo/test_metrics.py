"""Metrics compared with float64 loops over the token lists of the samples."""

import math
import random

import numpy as np
import pytest
import torch

from verl.protocol import DataProto
from verl.trainer.ppo.metrics import (
    compute_data_metrics,
    compute_mask_metrics,
    compute_mismatch_metrics,
    compute_seqlen_metrics,
    compute_throughput_metrics,
    compute_timing_metrics,
    compute_variance_proxy_metrics,
    compute_version_metrics,
    off_policy_metrics,
    probability_metrics,
)
from verl.utils.sampling_masks import SamplingMasks

P, T = 4, 6


def mismatch_of(batch):
    columns = batch.batch
    return compute_mismatch_metrics(columns["old_log_probs"], columns["rollout_log_probs"], columns["response_mask"])


def make_samples(lengths, seed=0, gaps=0.3):
    """Return one dict of lists per sample; `tool` marks response tokens that the model did not generate."""
    rng = random.Random(seed)
    samples = []
    for i, (prompt, response) in enumerate(lengths):
        rollout = [-rng.random() * 3 for _ in range(response)]
        samples.append(
            {
                "prompt": prompt,
                "tool": [i % 2 == 0 and t == 1 for t in range(response)],
                "rollout": rollout,
                "old": [x + rng.uniform(-gaps, gaps) for x in rollout],
                "scores": [rng.uniform(-1, 1) for _ in range(response)],
                "rewards": [rng.uniform(-1, 1) for _ in range(response)],
                "advantages": [rng.uniform(-2, 2) for _ in range(response)],
                "returns": [rng.uniform(-2, 2) for _ in range(response)],
                "values": [rng.uniform(-2, 2) for _ in range(response)],
            }
        )
    return samples


def make_batch(samples, pad=float("nan"), critic=True):
    """Return the padded columns; float columns are padded with `pad` so that the tests detect a read of the padding."""

    def column(name):
        return torch.tensor([s[name] + [pad] * (T - len(s[name])) for s in samples], dtype=torch.float32)

    masks = {"attention_mask": [], "response_mask": []}
    for s in samples:
        n = len(s["old"])
        masks["attention_mask"].append([0] * (P - s["prompt"]) + [1] * (s["prompt"] + n) + [0] * (T - n))
        masks["response_mask"].append([int(not tool) for tool in s["tool"]] + [0] * (T - n))
    tensors = {name: torch.tensor(rows) for name, rows in masks.items()}
    tensors["responses"] = torch.zeros(len(samples), T, dtype=torch.long)
    tensors |= {"rollout_log_probs": column("rollout"), "old_log_probs": column("old")}
    tensors |= {name: column(name) for name in ("advantages", "returns")}
    tensors |= {"token_level_scores": column("scores"), "token_level_rewards": column("rewards")}
    for name in ("token_level_scores", "token_level_rewards"):
        tensors[name] = tensors[name].nan_to_num(0.0)
    if critic:
        tensors["values"] = column("values")
    return DataProto.from_dict(tensors=tensors)


def tokens_of(samples, name):
    return [x for s in samples for x, tool in zip(s[name], s["tool"], strict=True) if not tool]


def mean(values):
    return math.fsum(values) / len(values)


def variance(values):
    return math.fsum((x - mean(values)) ** 2 for x in values) / (len(values) - 1)


def assert_close(metrics, expected):
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


LENGTHS = [(4, 6), (2, 3), (1, 0), (3, 1), (4, 2)]


def test_data_metrics_match_loops():
    samples = make_samples(LENGTHS)
    metrics = compute_data_metrics(make_batch(samples), max_prompt_length=4, max_response_length=6)
    nonempty = [s for s in samples if s["old"]]
    expected = {}
    for name, values in {
        "critic/score": [math.fsum(s["scores"]) for s in nonempty],
        "critic/rewards": [math.fsum(s["rewards"]) for s in nonempty],
        "critic/advantages": tokens_of(samples, "advantages"),
        "critic/returns": tokens_of(samples, "returns"),
        "critic/values": tokens_of(samples, "values"),
        "response_length": [len(s["old"]) for s in samples],
        "response_length_non_aborted": [len(s["old"]) for s in nonempty],
        "prompt_length": [s["prompt"] for s in samples],
    }.items():
        expected |= {f"{name}/mean": mean(values), f"{name}/max": max(values), f"{name}/min": min(values)}
    returns, values = tokens_of(samples, "returns"), tokens_of(samples, "values")
    residual = variance([r - v for r, v in zip(returns, values, strict=True)])
    expected["critic/vf_explained_var"] = 1 - residual / (variance(returns) + 1e-5)
    expected |= {"response_length/clip_ratio": 1 / 5, "response_length_non_aborted/clip_ratio": 1 / 4}
    expected |= {"prompt_length/clip_ratio": 2 / 5, "response/aborted_ratio": 1 / 5}
    assert_close(metrics, expected)
    assert metrics.keys() == expected.keys()


def test_clip_ratio_uses_the_limit_not_the_width_of_the_batch():
    metrics = compute_data_metrics(make_batch(make_samples(LENGTHS)), max_prompt_length=9, max_response_length=9)
    assert metrics["response_length/clip_ratio"] == metrics["prompt_length/clip_ratio"] == 0.0


def test_without_critic_there_are_no_value_metrics():
    metrics = compute_data_metrics(make_batch(make_samples(LENGTHS), critic=False), 4, 6)
    assert not [name for name in metrics if "value" in name or "vf_" in name]


def test_timing_and_throughput_metrics():
    batch = make_batch(make_samples(LENGTHS))
    timing = {"gen": 3.0, "update_actor": 2.0, "reward": 0.5, "step": 8.0}
    metrics = compute_timing_metrics(batch, timing)
    assert {name: metrics[f"timing_s/{name}"] for name in timing} == timing
    # 12 response and 14 prompt tokens
    assert metrics["timing_per_token_ms/gen"] == pytest.approx(3000 / 12)
    assert metrics["timing_per_token_ms/update_actor"] == pytest.approx(2000 / 26)
    assert "timing_per_token_ms/reward" not in metrics
    assert compute_throughput_metrics(batch, timing, n_devices=2) == {
        "perf/total_num_tokens": 26,
        "perf/time_per_step": 8.0,
        "perf/throughput": pytest.approx(26 / 16),
    }


def mismatch_by_loops(samples):
    p = [math.exp(x) for x in tokens_of(samples, "rollout")]
    q = [math.exp(x) for x in tokens_of(samples, "old")]
    d = [o - r for o, r in zip(tokens_of(samples, "old"), tokens_of(samples, "rollout"), strict=True)]
    diff = [abs(a - b) for a, b in zip(p, q, strict=True)]
    mp, mq = mean(p), mean(q)
    covariance = math.fsum((a - mp) * (b - mq) for a, b in zip(p, q, strict=True))
    spread = math.sqrt(math.fsum((a - mp) ** 2 for a in p)) * math.sqrt(math.fsum((b - mq) ** 2 for b in q))
    rows = [s for s in samples if tokens_of([s], "old")]
    old_means = [mean(tokens_of([s], "old")) for s in rows]
    rollout_means = [mean(tokens_of([s], "rollout")) for s in rows]
    gaps = [r - o for r, o in zip(rollout_means, old_means, strict=True)]
    sums = [-g * len(tokens_of([s], "old")) for g, s in zip(gaps, rows, strict=True)]
    return {
        "training/rollout_probs_diff_valid": 1,
        "training/rollout_probs_diff_mean": mean(diff),
        "training/rollout_probs_diff_max": max(diff),
        "training/rollout_probs_diff_std": math.sqrt(variance(diff)),
        "training/rollout_actor_probs_pearson_corr": covariance / spread,
        "rollout_corr/kl": mean([-x for x in d]),
        "rollout_corr/k3_kl": mean([math.exp(x) - x - 1 for x in d]),
        "rollout_corr/training_ppl": mean([math.exp(-x) for x in old_means]),
        "rollout_corr/rollout_ppl": mean([math.exp(-x) for x in rollout_means]),
        "rollout_corr/training_log_ppl": -mean(old_means),
        "rollout_corr/rollout_log_ppl": -mean(rollout_means),
        "rollout_corr/log_ppl_diff": mean(gaps),
        "rollout_corr/log_ppl_abs_diff": mean([abs(g) for g in gaps]),
        "rollout_corr/log_ppl_diff_max": max(gaps),
        "rollout_corr/log_ppl_diff_min": min(gaps),
        "rollout_corr/ppl_ratio": mean([math.exp(g) for g in gaps]),
        "rollout_corr/chi2_token": mean([math.exp(2 * x) for x in d]) - 1,
        "rollout_corr/chi2_seq": mean([math.exp(2 * x) for x in sums]) - 1,
    }


@pytest.mark.parametrize("seed", range(3))
def test_mismatch_metrics_match_loops(seed):
    samples = make_samples(LENGTHS, seed=seed)
    metrics = mismatch_of(make_batch(samples))
    expected = mismatch_by_loops(samples)
    assert_close(metrics, expected)
    assert metrics.keys() == expected.keys()


def test_log_ratios_are_limited_in_chi2():
    old, rollout = torch.tensor([[0.0, -0.1]]), torch.tensor([[-30.0, -0.1]])
    metrics = off_policy_metrics(old, rollout, torch.ones(1, 2))
    assert metrics["rollout_corr/chi2_token"] == pytest.approx((math.exp(40) + 1) / 2 - 1)
    assert metrics["rollout_corr/chi2_seq"] == pytest.approx(math.exp(40) - 1)


@pytest.mark.parametrize("lengths", [[(2, 0), (3, 0)], [(2, 1)], [(2, 3)], [(1, 0), (2, 1)], []])
def test_degenerate_batches_give_finite_metrics(lengths):
    samples = make_samples(lengths, seed=1)
    for s in samples:
        s["tool"] = [False] * len(s["old"])
    if not samples:
        batch = make_batch(make_samples([(1, 1)]))[:0]
    else:
        batch = make_batch(samples)
    timing = {"gen": 1.0, "update_actor": 1.0, "step": 0.0}
    metrics = compute_data_metrics(batch, 4, 6) | compute_timing_metrics(batch, timing)
    metrics |= compute_throughput_metrics(batch, timing, 1) | mismatch_of(batch)
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    tokens = sum(n for _, n in lengths)
    assert metrics["training/rollout_probs_diff_valid"] == int(tokens > 0)
    if tokens <= 1:
        assert metrics["training/rollout_probs_diff_std"] == 0.0
    if lengths and not tokens:
        assert metrics["response/aborted_ratio"] == 1.0


def test_a_fully_masked_batch_gives_neutral_metrics():
    samples = make_samples([(2, 3), (1, 2)])
    for s in samples:
        s["tool"] = [True] * len(s["old"])
    metrics = mismatch_of(make_batch(samples))
    ones = {"rollout_corr/training_ppl", "rollout_corr/rollout_ppl", "rollout_corr/ppl_ratio"}
    assert metrics == {name: float(name in ones) for name in metrics}
    assert compute_data_metrics(make_batch(samples), 4, 6)["critic/advantages/mean"] == 0.0


def test_undefined_pearson_is_one_for_equal_probabilities_and_zero_otherwise():
    def pearson(old, rollout):
        mask = torch.ones(1, len(old))
        metrics = probability_metrics(torch.tensor([old]), torch.tensor([rollout]), mask)
        return metrics["training/rollout_actor_probs_pearson_corr"]

    assert pearson([-1.0, -1.0], [-1.0, -1.0]) == 1.0
    assert pearson([-1.0, -1.0], [-1.0, -2.0]) == 0.0
    assert pearson([-1.0], [-1.0]) == 1.0
    assert pearson([-1.0, -2.0, -0.5], [-1.0, -2.0, -0.5]) == pytest.approx(1.0)


def test_a_nan_in_the_data_is_not_hidden():
    batch = make_batch(make_samples(LENGTHS))
    batch.batch["old_log_probs"][0, 0] = float("nan")
    metrics = mismatch_of(batch)
    assert math.isnan(metrics["rollout_corr/kl"]) and math.isnan(metrics["training/rollout_probs_diff_max"])


def test_seqlen_metrics_before_and_after_balancing():
    lengths = [10, 1, 2, 7, 5]
    metrics = compute_seqlen_metrics(lengths, [[0, 2], [1, 3, 4]])
    assert metrics == {
        "global_seqlen/min": 12,  # 7 + 5
        "global_seqlen/max": 13,  # 10 + 1 + 2
        "global_seqlen/minmax_diff": 1,
        "global_seqlen/balanced_min": 12,
        "global_seqlen/balanced_max": 13,
        "global_seqlen/mean": 12.5,
    }
    assert compute_seqlen_metrics(lengths, [[0, 1, 2], [3, 4]], prefix="x")["x/max"] == 13


@pytest.mark.parametrize("partitions", [[], [[0]], [[0, 1], [1]]])
def test_seqlen_metrics_reject_incomplete_partitions(partitions):
    with pytest.raises(ValueError, match="exactly once"):
        compute_seqlen_metrics([3, 4], partitions)


def test_versions_behind_count_from_the_training_weights():
    versions = torch.tensor([[4, 4, -1], [5, 6, 6], [-1, -1, -1]])
    assert compute_version_metrics(versions, 6) == {
        "training/versions_behind/min": 0.0,
        "training/versions_behind/max": 2.0,
        "training/versions_behind/mean": 1.0,
    }
    assert compute_version_metrics(versions[2:], 6) == {}


def test_mask_metrics_count_the_tokens_that_have_a_mask():
    data = make_masks([[0, 1, 4], [], [1, 0, 2, 1]])
    assert compute_mask_metrics(data) == {
        "sampling_mask/kept_tokens/mean": 9 / 5,
        "sampling_mask/kept_tokens/max": 4.0,
        "sampling_mask/single_fraction": 3 / 5,
    }
    assert compute_mask_metrics(make_masks([[0], []])) == {} == compute_mask_metrics(DataProto())


def make_masks(counts):
    """A batch whose masks have these sizes."""
    masks = [SamplingMasks(np.zeros(sum(row), np.int32), np.array(row, np.int32)) for row in counts]
    return DataProto.from_dict(non_tensors={"sampling_masks": masks})


@pytest.mark.parametrize("weighted", [False, True])
def test_variance_proxies_are_those_of_the_samples_gradients(weighted):
    """W is the squared norm of the gradient of the log-probability with respect to the logits, from autograd."""
    generator = torch.Generator().manual_seed(3)
    samples, width, vocabulary = 3, 4, 5
    logits = torch.randn(samples, width, vocabulary, generator=generator, dtype=torch.float64)
    responses = torch.randint(vocabulary, (samples, width), generator=generator)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 0, 0]])
    advantages = torch.randn(samples, width, generator=generator, dtype=torch.float64)
    weights = 0.5 + torch.rand(samples, width, generator=generator, dtype=torch.float64)
    log_probs = logits.log_softmax(-1)
    columns = {
        "old_log_probs": log_probs.gather(-1, responses.unsqueeze(-1)).squeeze(-1),
        "sum_pi_squared": log_probs.exp().square().sum(-1),
        "advantages": advantages,
        "response_mask": mask,
    }
    if weighted:
        columns["rollout_is_weights"] = weights
    found = compute_variance_proxy_metrics(DataProto.from_dict(tensors=columns), gradient_norm=0.25)
    power, squares, scores = [], [], []
    for i in range(samples):
        steps = [t for t in range(width) if mask[i, t]]
        norms = []
        for t in steps:
            leaf = logits[i, t].clone().requires_grad_()
            leaf.log_softmax(-1)[responses[i, t]].backward()
            norms.append(float(leaf.grad.square().sum()))
        advantage = sum(float(advantages[i, t]) for t in steps) / len(steps)
        w = [float(weights[i, t]) if weighted else 1.0 for t in steps]
        power.append((sum(w) / len(w)) ** 2 * advantage**2 * sum(norms))
        squares.append(advantage**2)
        scores.append(sum(weight**2 * norm for weight, norm in zip(w, norms, strict=True)))
    expected = {
        "proxy1_signal_strength": 0.0625,
        "proxy2_total_power": sum(power) / 3,
        "proxy3_pure_noise": (sum(power) / 3 - 0.0625) / 2,
        "expected_a_squared": sum(squares) / 3,
        "expected_w": sum(scores) / 3,
    }
    assert found == pytest.approx({f"variance_proxy/{name}": value for name, value in expected.items()})


def test_no_variance_proxy_is_made_up():
    columns = {name: torch.ones(1, 2) for name in ("old_log_probs", "advantages", "response_mask")}
    batch = DataProto.from_dict(tensors=columns)
    assert compute_variance_proxy_metrics(batch, 1.0) == {}
    batch = DataProto.from_dict(tensors=columns | {"sum_pi_squared": torch.ones(1, 2)})
    assert "variance_proxy/proxy1_signal_strength" not in compute_variance_proxy_metrics(batch)
    assert "variance_proxy/proxy3_pure_noise" not in compute_variance_proxy_metrics(batch, 1.0)
