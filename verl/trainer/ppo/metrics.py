"""Metrics of one training step under the names of upstream verl, as pure functions of the batch.

All sums are computed in float64. A mean, maximum, minimum or spread of no values is 0, and so is the spread of one
value. A step with empty responses, masked samples or a single sample therefore gives finite metrics;
`response/aborted_ratio` and `training/rollout_probs_diff_valid` identify such a step. A NaN in the data stays NaN.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from verl.algorithms.aggregation import LOG_RATIO_BOUND
from verl.protocol import DataProto
from verl.utils.sampling_masks import COLUMN as SAMPLING_MASKS

# Stages that process every token. Generation produces only the response tokens.
ALL_TOKEN_STAGES = ("old_log_prob", "ref", "values", "adv", "update_critic", "update_actor")


def _summary(values: torch.Tensor, prefix: str) -> dict[str, float]:
    if values.numel() == 0:
        return {f"{prefix}/mean": 0.0, f"{prefix}/max": 0.0, f"{prefix}/min": 0.0}
    values = values.double()
    return {
        f"{prefix}/mean": values.mean().item(),
        f"{prefix}/max": values.max().item(),
        f"{prefix}/min": values.min().item(),
    }


def _variance(values: torch.Tensor) -> float:
    """Return the unbiased variance, 0 for fewer than two values."""
    return values.double().var().item() if values.numel() > 1 else 0.0


def _ratio(flags: torch.Tensor) -> float:
    return flags.double().mean().item() if flags.numel() else 0.0


def _lengths(batch: DataProto) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompt and response lengths, float64 [B], from the attention mask; tool tokens count as response."""
    width = batch.batch["responses"].shape[-1]
    mask = batch.batch["attention_mask"]
    split = mask.shape[-1] - width
    return mask[:, :split].sum(-1).double(), mask[:, split:].sum(-1).double()


def compute_data_metrics(batch: DataProto, max_prompt_length: int, max_response_length: int) -> dict[str, float]:
    """Return metrics of the scores, rewards, advantages, returns, values and lengths of a batch.

    Scores and rewards are sums over the tokens of a sample, for samples with a response (for all samples if none has
    one). Advantages, returns and values are taken over the tokens with response_mask 1. `clip_ratio` is the fraction of
    samples that reach the given limit, not the padded width of this batch.

    Args:
        batch: columns responses [B,T], attention_mask [B,P+T], response_mask [B,T], token_level_scores [B,T],
            token_level_rewards [B,T], advantages [B,T], returns [B,T]; values [B,T] if there is a critic.
        max_prompt_length: limit of a prompt in tokens.
        max_response_length: limit of a response in tokens.

    Returns:
        critic/{score,rewards,advantages,returns}/{mean,max,min}; with a critic critic/values/{mean,max,min} and
        critic/vf_explained_var = 1 - var(returns - values) / (var(returns) + 1e-5);
        {prompt_length,response_length,response_length_non_aborted}/{mean,max,min,clip_ratio}; response/aborted_ratio.
    """
    columns = batch.batch
    prompt_length, response_length = _lengths(batch)
    aborted = response_length == 0
    nonempty = ~aborted if not bool(aborted.all()) else torch.ones_like(aborted)
    mask = columns["response_mask"].bool()

    metrics = {
        **_summary(columns["token_level_scores"].double().sum(-1)[nonempty], "critic/score"),
        **_summary(columns["token_level_rewards"].double().sum(-1)[nonempty], "critic/rewards"),
        **_summary(columns["advantages"][mask], "critic/advantages"),
        **_summary(columns["returns"][mask], "critic/returns"),
    }
    if "values" in columns:
        returns, values = columns["returns"][mask].double(), columns["values"][mask].double()
        metrics |= _summary(values, "critic/values")
        metrics["critic/vf_explained_var"] = 1.0 - _variance(returns - values) / (_variance(returns) + 1e-5)
    for name, lengths, limit in (
        ("response_length", response_length, max_response_length),
        ("response_length_non_aborted", response_length[~aborted], max_response_length),
        ("prompt_length", prompt_length, max_prompt_length),
    ):
        metrics |= _summary(lengths, name)
        metrics[f"{name}/clip_ratio"] = _ratio(lengths >= limit)
    metrics["response/aborted_ratio"] = _ratio(aborted)
    return metrics


def compute_variance_proxy_metrics(batch: DataProto, gradient_norm: float | None = None) -> dict[str, float]:
    """Return estimates of the variance of the policy gradient, from the probabilities of the tokens.

    W = sum_t (1 - 2 pi(y_t) + sum_v pi(v)^2) over the response tokens of a sample is the squared norm of the gradient
    of its log-probability with respect to the logits, A its mean advantage, rho its mean importance weight (1 without
    rollout_is_weights), N the number of samples. The names are those of upstream verl.

    Args:
        batch: columns sum_pi_squared, old_log_probs, advantages, response_mask, and optional rollout_is_weights [B,T].
        gradient_norm: norm of the gradient of the update; None if there was none.

    Returns:
        variance_proxy/proxy2_total_power = E[rho^2 A^2 W], an estimate of the mean squared norm of a sample's gradient;
        variance_proxy/{expected_a_squared,expected_w} = E[A^2] and E[sum_t w_t^2 (1 - 2 pi + sum pi^2)] with the
        weights w; with a gradient norm variance_proxy/proxy1_signal_strength, its square, and from two samples on
        variance_proxy/proxy3_pure_noise = max(0, proxy2 - proxy1) / (N - 1), the variance of the mean gradient. Empty
        without the column sum_pi_squared, which only the optimal-token-baseline estimators have.
    """
    columns = batch.batch
    if not {"sum_pi_squared", "old_log_probs", "advantages"} <= set(columns.keys()):
        return {}
    mask = columns["response_mask"].bool()
    tokens = mask.sum(-1).clamp(min=1)

    def total(values: torch.Tensor) -> torch.Tensor:
        return values.double().masked_fill(~mask, 0.0).sum(-1)

    score = 1.0 - 2.0 * columns["old_log_probs"].double().exp() + columns["sum_pi_squared"].double()
    weights = columns["rollout_is_weights"].double() if "rollout_is_weights" in columns else torch.ones_like(score)
    advantage, weight = total(columns["advantages"]) / tokens, total(weights) / tokens
    power = (weight.square() * advantage.square() * total(score).clamp(min=0.0)).mean().item()
    metrics = {
        "variance_proxy/proxy2_total_power": power,
        "variance_proxy/expected_a_squared": advantage.square().mean().item(),
        "variance_proxy/expected_w": total(weights.square() * score).mean().item(),
    }
    if gradient_norm is not None:
        signal = metrics["variance_proxy/proxy1_signal_strength"] = float(gradient_norm) ** 2
        if len(mask) > 1:
            metrics["variance_proxy/proxy3_pure_noise"] = max(0.0, power - signal) / (len(mask) - 1)
    return metrics


def compute_version_metrics(weight_versions: torch.Tensor, version: int) -> dict[str, float]:
    """Return how many updates the weights that generated the tokens are behind the weights that train on them.

    Args:
        weight_versions: [B,T] int64, -1 at positions without a model token.
        version: version of the weights that the step starts with.

    Returns:
        training/versions_behind/{min,max,mean} over all tokens; empty without a token.
    """
    versions = weight_versions[weight_versions >= 0]
    if not versions.numel():
        return {}
    return {
        "training/versions_behind/min": float(version - versions.max()),
        "training/versions_behind/max": float(version - versions.min()),
        "training/versions_behind/mean": float(version - versions.double().mean()),
    }


def compute_mask_metrics(batch: DataProto) -> dict[str, float]:
    """Return how many tokens the sampler could choose from.

    Args:
        batch: `sampling_masks` [B], optional.

    Returns:
        sampling_mask/kept_tokens/{mean,max}, and sampling_mask/single_fraction, the share of tokens that were the only
        choice, over the tokens with a mask; empty without such a token.
    """
    masks = batch.non_tensor_batch.get(SAMPLING_MASKS, ())
    counts = np.concatenate([np.zeros(0, np.int32), *(each.counts for each in masks)])
    counts = counts[counts > 0]
    if not len(counts):
        return {}
    return {
        "sampling_mask/kept_tokens/mean": float(counts.mean()),
        "sampling_mask/kept_tokens/max": float(counts.max()),
        "sampling_mask/single_fraction": float((counts == 1).mean()),
    }


def compute_timing_metrics(batch: DataProto, timing_raw: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of each stage, and milliseconds per token of the stages that process tokens.

    Args:
        batch: columns responses [B,T] and attention_mask [B,P+T].
        timing_raw: seconds by stage name.

    Returns:
        timing_s/NAME for every stage; timing_per_token_ms/NAME for `gen` (over response tokens) and for
        `ALL_TOKEN_STAGES` (over prompt and response tokens), omitted if there is no token.
    """
    prompt_length, response_length = _lengths(batch)
    response_tokens = response_length.sum().item()
    tokens = {"gen": response_tokens, **dict.fromkeys(ALL_TOKEN_STAGES, response_tokens + prompt_length.sum().item())}
    metrics = {f"timing_s/{name}": float(seconds) for name, seconds in timing_raw.items()}
    for name, seconds in timing_raw.items():
        if tokens.get(name, 0) > 0:
            metrics[f"timing_per_token_ms/{name}"] = 1000.0 * seconds / tokens[name]
    return metrics


def compute_throughput_metrics(batch: DataProto, timing: Mapping[str, float], n_devices: int) -> dict[str, float]:
    """Return the number of tokens of the step and the throughput.

    Args:
        batch: column attention_mask [B,P+T].
        timing: seconds by stage name; `step` is the whole step.
        n_devices: number of devices (or CPU processes) of the trainer.

    Returns:
        perf/total_num_tokens (prompt and response tokens), perf/time_per_step (seconds) and perf/throughput
        (tokens per second per device; 0 for a step that took no time).
    """
    tokens, seconds = int(batch.batch["attention_mask"].sum()), float(timing["step"])
    return {
        "perf/total_num_tokens": tokens,
        "perf/time_per_step": seconds,
        "perf/throughput": tokens / (seconds * n_devices) if seconds > 0 else 0.0,
    }


def compute_mismatch_metrics(
    old_log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, response_mask: torch.Tensor
) -> dict[str, float]:
    """Return metrics of the difference between the policy in the rollout engine and in the training engine.

    Args:
        old_log_probs, rollout_log_probs: [B,T] float.
        response_mask: [B,T], non-zero for a generated token.

    Returns:
        The metrics of `probability_metrics` and `off_policy_metrics`.
    """
    arguments = old_log_probs, rollout_log_probs, response_mask
    return {**probability_metrics(*arguments), **off_policy_metrics(*arguments)}


def probability_metrics(
    old_log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, response_mask: torch.Tensor
) -> dict[str, float]:
    """Return the differences between the probabilities of the generated tokens in the two engines.

    With p = exp(rollout_log_probs) and q = exp(old_log_probs) over the tokens with response_mask 1:

    - training/rollout_probs_diff_{mean,max,std}: of |p - q|; std is unbiased;
    - training/rollout_actor_probs_pearson_corr: Pearson correlation of p and q (MiniMax-M1, arXiv:2506.13585,
      section 3.2). If it is undefined (fewer than two tokens, or one side constant), it is 1 if p equals q, else 0;
    - training/rollout_probs_diff_valid: 1, or 0 if no token was generated; then the others are 0.

    Args:
        old_log_probs, rollout_log_probs: [B,T] float.
        response_mask: [B,T], non-zero for a generated token.
    """
    mask = response_mask.bool()
    p, q = rollout_log_probs[mask].double().exp(), old_log_probs[mask].double().exp()
    difference = (p - q).abs()
    summary = _summary(difference, "diff")
    return {
        "training/rollout_probs_diff_valid": int(difference.numel() > 0),
        "training/rollout_probs_diff_mean": summary["diff/mean"],
        "training/rollout_probs_diff_max": summary["diff/max"],
        "training/rollout_probs_diff_std": _variance(difference) ** 0.5,
        "training/rollout_actor_probs_pearson_corr": _pearson(p, q),
    }


def _pearson(p: torch.Tensor, q: torch.Tensor) -> float:
    if p.numel() == 0:
        return 0.0
    a, b = p - p.mean(), q - q.mean()
    norms = (a.square().sum().sqrt() * b.square().sum().sqrt()).item()
    if norms == 0.0:
        return 1.0 if torch.equal(p, q) else 0.0
    return (a * b).sum().item() / norms


def off_policy_metrics(
    old_log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, response_mask: torch.Tensor
) -> dict[str, float]:
    """Return divergences and perplexities of training policy pi and rollout policy mu on the generated tokens.

    With d = old_log_probs - rollout_log_probs = log(pi/mu); E_token over tokens with response_mask 1, E_seq over the
    samples that have such a token, <x> the mean over one sample's tokens:

    - rollout_corr/kl = E_token[-d], the k1 estimate of KL(mu || pi);
    - rollout_corr/k3_kl = E_token[exp(d) - d - 1], its k3 estimate: never negative, low variance
      (J. Schulman, "Approximating KL Divergence", 2020, joschu.net/blog/kl-approx.html);
    - rollout_corr/{training,rollout}_log_ppl = E_seq[-<log p>], {training,rollout}_ppl = E_seq[exp(-<log p>)];
    - rollout_corr/log_ppl_diff = E_seq[<-d>], with _abs_diff, _diff_max, _diff_min over the samples, and
      rollout_corr/ppl_ratio = E_seq[exp(<-d>)], above 1 if the text is less likely under the training policy;
    - rollout_corr/chi2_token = E_token[exp(2d)] - 1 and chi2_seq = E_seq[exp(2 sum d)] - 1, the chi-squared divergence
      of pi from mu, i.e. the variance of the importance weights (A. B. Owen, "Monte Carlo theory, methods and
      examples", section 9.3); d and sum d are limited to +-20 here.

    Without any token they have the values of identical policies: 0, and 1 for the ratios and perplexities.

    Args:
        old_log_probs, rollout_log_probs: [B,T] float.
        response_mask: [B,T], non-zero for a generated token.
    """
    mask = response_mask.bool()
    if not bool(mask.any()):
        # The neutral sample: one token that has probability one in both engines.
        mask = torch.ones(1, 1, dtype=torch.bool)
        old_log_probs = rollout_log_probs = torch.zeros(1, 1)
    rows = mask.any(-1)
    mask = mask[rows]
    count = mask.sum(-1)
    # masked_fill, not a product: padding may hold -inf or NaN.
    old, rollout = (x[rows].double().masked_fill(~mask, 0.0) for x in (old_log_probs, rollout_log_probs))
    d = old - rollout
    d_token, d_sum = d[mask], d.sum(-1)
    old_mean, rollout_mean = old.sum(-1) / count, rollout.sum(-1) / count
    gap = -d_sum / count
    values = {
        "kl": -d_token.mean(),
        "k3_kl": (d_token.exp() - d_token - 1.0).mean(),
        "training_ppl": (-old_mean).exp().mean(),
        "training_log_ppl": -old_mean.mean(),
        "rollout_ppl": (-rollout_mean).exp().mean(),
        "rollout_log_ppl": -rollout_mean.mean(),
        "log_ppl_diff": gap.mean(),
        "log_ppl_abs_diff": gap.abs().mean(),
        "log_ppl_diff_max": gap.max(),
        "log_ppl_diff_min": gap.min(),
        "ppl_ratio": gap.exp().mean(),
        "chi2_token": (2.0 * d_token.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)).exp().mean() - 1.0,
        "chi2_seq": (2.0 * d_sum.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)).exp().mean() - 1.0,
    }
    return {f"rollout_corr/{name}": value.item() for name, value in values.items()}


def compute_seqlen_metrics(
    lengths: Sequence[int], partitions: Sequence[Sequence[int] | np.ndarray], prefix: str = "global_seqlen"
) -> dict[str, float]:
    """Return how evenly the tokens are distributed over the ranks, before and after balancing.

    Args:
        lengths: tokens of each sample, in batch order.
        partitions: by rank, its indices into `lengths`.
        prefix: prefix of the metric names.

    Returns:
        PREFIX/{min,max,minmax_diff}: tokens per rank if each rank had consecutive samples;
        PREFIX/{balanced_min,balanced_max}: tokens per rank with `partitions`; PREFIX/mean: mean tokens per rank.

    Raises:
        ValueError: there is no partition, or the partitions do not contain every sample exactly once.
    """
    held = sorted(index for part in partitions for index in part)
    if not partitions or held != list(range(len(lengths))):
        raise ValueError(
            f"partitions={[list(part) for part in partitions]}: expected every index 0..{len(lengths) - 1} exactly once"
        )
    before = [int(part.sum()) for part in np.array_split(np.asarray(lengths, dtype=np.int64), len(partitions))]
    after = [sum(int(lengths[index]) for index in part) for part in partitions]
    return {
        f"{prefix}/min": min(before),
        f"{prefix}/max": max(before),
        f"{prefix}/minmax_diff": max(before) - min(before),
        f"{prefix}/balanced_min": min(after),
        f"{prefix}/balanced_max": max(after),
        f"{prefix}/mean": sum(after) / len(partitions),
    }
