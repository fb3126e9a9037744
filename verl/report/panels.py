"""Curves of the report: one `Panel` per figure, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from verl.report.run import Run
from verl.report.style import short


@dataclass(frozen=True)
class Panel:
    """One figure of curves over the steps.

    Attributes:
        key: name of its PNG.
        title: what it shows.
        unit: of the vertical axis.
        curves: metric to what it is called in the legend.
        says: how to read it, one or two sentences.
        absent: why a run may not have it.
        log: a logarithmic vertical axis; what is not above 0 is left out.
        share: values in 0..1, shown as percents.
        limit: a config key whose value is drawn as a line.
        markers: a mark at each value, for curves of few.
        from_zero: the axis begins there, so that a small change looks small.
        unless_zero: left out where every value is 0.
    """

    key: str
    title: str
    unit: str
    curves: dict[str, str]
    says: str
    absent: str = ""
    log: bool = False
    share: bool = False
    limit: str = ""
    markers: bool = False
    from_zero: bool = False
    unless_zero: bool = False


LEARNING = (
    Panel(
        "reward",
        "Reward in training",
        "reward of a sample",
        {"critic/score/mean": "mean", "critic/rewards/mean": "mean, minus the KL penalty"},
        "Reward of the samples of each step. It should rise, and then level off.",
    ),
)
RESPONSES = (
    Panel(
        "response_length",
        "Length of a response",
        "tokens",
        {"response_length/mean": "mean", "response_length/max": "longest"},
        "A length that grows without limit, or falls to zero, often means that the reward depends on length.",
        limit="data.max_response_length",
    ),
    Panel(
        "cut_off",
        "Cut off at the length limit",
        "share of samples",
        {"response_length/clip_ratio": "cut off"},
        "Responses that reached the limit. Many of them: data.max_response_length is too small, or the policy rambles.",
        share=True,
    ),
)
POLICY = (
    Panel(
        "entropy",
        "Entropy",
        "nats per token",
        {"actor/entropy": "entropy"},
        "Uncertainty of the policy about a token. It falls during learning; near 0 the policy no longer explores.",
    ),
    Panel(
        "kl",
        "KL divergence",
        "nats per token",
        {
            "actor/ppo_kl": "from the policy before the step",
            "actor/kl_loss": "from the reference (loss)",
            "actor/reward_kl_penalty": "from the reference (reward)",
        },
        "Distance that an update moves the policy and, with a KL term, its distance from the reference model.",
    ),
    Panel(
        "grad_norm",
        "Gradient norm",
        "norm before clipping",
        {"actor/grad_norm": "policy", "critic/grad_norm": "critic"},
        "Repeated peaks indicate a learning rate that is too high.",
        log=True,
    ),
    Panel(
        "clip_fraction",
        "Clipped by the loss",
        "share of tokens",
        {"actor/pg_clipfrac": "clipped", "actor/pg_clipfrac_lower": "clipped from below"},
        "Tokens whose probability ratio left the trust region; they no longer change the policy.",
        share=True,
    ),
    Panel(
        "learning_rate",
        "Learning rate",
        "learning rate",
        {"actor/lr": "policy", "critic/lr": "critic"},
        "Set by the schedule.",
    ),
    Panel(
        "critic_loss",
        "Loss of the critic",
        "value loss",
        {"critic/vf_loss": "value loss"},
        "It should fall while the critic learns.",
        "algorithm.adv_estimator has no critic",
    ),
    Panel(
        "critic_explained",
        "Variance explained by the critic",
        "share of the returns' variance",
        {"critic/vf_explained_var": "explained"},
        "1 for a critic that foresees every return, 0 for one that knows their mean only.",
        "algorithm.adv_estimator has no critic",
    ),
)
_NO_LOG_PROBS = "actor_rollout_ref.rollout.calculate_log_probs is off"
_NO_CORRECTION = "algorithm.rollout_correction is off"
MISMATCH = (
    Panel(
        "probability_difference",
        "Probabilities: rollout against trainer",
        "|p rollout - p trainer| of a token",
        {"training/rollout_probs_diff_mean": "mean", "training/rollout_probs_diff_max": "largest"},
        "Engine and trainer compute different probabilities of the same token: number formats, kernels, quantized "
        "weights. The mean should stay low and constant; a steady rise can destroy a run.",
        _NO_LOG_PROBS,
        log=True,
    ),
    Panel(
        "rollout_kl",
        "KL divergence of rollout and trainer",
        "nats per token",
        {"rollout_corr/k3_kl": "k3 estimate"},
        "The same difference as one number per step. If it grows, use algorithm.rollout_correction.",
        _NO_LOG_PROBS,
        log=True,
    ),
    Panel(
        "importance_weights",
        "Correction: importance weights",
        "weight per token",
        {"rollout_corr/rollout_is_mean": "mean", "rollout_corr/rollout_is_max": "largest"},
        "Factor of each token's loss. A mean far from 1 means that the two policies differ much.",
        f"{_NO_CORRECTION}: rollout_is is null",
    ),
    Panel(
        "effective_samples",
        "Correction: effective sample size",
        "share of tokens",
        {"rollout_corr/rollout_is_eff_sample_size": "effective"},
        "Effective share of the batch after weighting. Near 100 % nothing is lost.",
        f"{_NO_CORRECTION}: rollout_is is null",
        share=True,
    ),
    Panel(
        "rejected",
        "Correction: rejected",
        "share",
        {
            "rollout_corr/rollout_rs_masked_fraction": "tokens",
            "rollout_corr/rollout_rs_seq_masked_fraction": "samples with a rejected token",
        },
        "Tokens and samples excluded from the update because the two policies differ too much on them.",
        f"{_NO_CORRECTION}: rollout_rs is null",
        share=True,
    ),
    Panel(
        "staleness",
        "Age of the generating weights",
        "weight updates behind",
        {"training/versions_behind/max": "oldest token", "training/versions_behind/min": "newest token"},
        "0 where each batch is generated by the newest weights, 1 with trainer.rollout_lag=1.",
        "0 throughout: each batch is generated by the newest weights",
        unless_zero=True,
    ),
)
SPEED = (
    Panel(
        "step_seconds",
        "Time of a step",
        "seconds",
        {"timing_s/step": "step"},
        "Steps with a validation take longer.",
    ),
    Panel(
        "throughput",
        "Throughput",
        "tokens per second and device",
        {"perf/throughput": "tokens per second"},
        "Tokens of prompts and responses, over the full step.",
    ),
    Panel(
        "memory",
        "Memory of the trainer",
        "GiB, peak of a rank",
        {"actor/perf/max_memory_allocated_gb": "policy", "critic/perf/max_memory_allocated_gb": "critic"},
        "Largest use of any rank so far. A curve that never levels off indicates a leak.",
        from_zero=True,
    ),
)
MAX_SOURCES = 6


def validation(runs: Sequence[Run]) -> tuple[Panel, ...]:
    """Return a panel for each of the first `MAX_SOURCES` data sources: mean and best of the main variables."""
    curves: dict[str, dict[str, str]] = {}
    names = dict.fromkeys(name for run in runs for name in run.names())
    for name in sorted(names, key=lambda name: (not name.startswith("val-core/"), "/mean@" not in name)):
        source, _, rest = name.partition("/")[2].rpartition("/")
        if not name.startswith(("val-core/", "val-aux/")):
            continue
        if rest == "mean":  # best@4/mean
            source, _, statistic = source.rpartition("/")
            kind = "best" if statistic.startswith("best@") else "majority" if statistic.startswith("maj@") else ""
        else:
            statistic, kind = rest, "mean" if rest.startswith("mean@") else ""
        source, _, variable = source.rpartition("/")
        core = name.startswith("val-core/") or (variable == "reward" and kind == "mean")
        if kind and source and core:
            number = statistic.rpartition("@")[2]
            of = {"mean": f"mean of {number}", "best": f"best of {number}", "majority": f"majority of {number}"}[kind]
            curves.setdefault(source, {})[name] = f"{short(variable, 40)}, {of if number != '1' else 'one sample'}"
    return tuple(
        Panel(
            f"validation_{number}" if number else "validation",
            f"Validation: {short(source, 200)}",
            "mean over the prompts",
            of_source,
            "On prompts that are not trained on. Trust this curve more than the reward in training.",
            markers=True,
        )
        for number, (source, of_source) in enumerate(sorted(curves.items())[:MAX_SOURCES])
    )
