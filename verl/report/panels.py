"""Which curves the report shows: one `Panel` for each figure, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from verl.report.run import Run


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
        {"critic/score/mean": "mean", "critic/rewards/mean": "mean, less the KL penalty"},
        "What the reward function gave to the samples of each step. It should rise, and then level off.",
    ),
)
RESPONSES = (
    Panel(
        "response_length",
        "Length of a response",
        "tokens",
        {"response_length/mean": "mean", "response_length/max": "longest"},
        "A length that runs away, or falls to nothing, is often a reward that pays for length.",
        limit="data.max_response_length",
    ),
    Panel(
        "cut_off",
        "Cut off at the length limit",
        "share of the samples",
        {"response_length/clip_ratio": "cut off"},
        "Responses that reached the limit. Where many do, data.max_response_length is too small or the policy rambles.",
        share=True,
    ),
)
POLICY = (
    Panel(
        "entropy",
        "Entropy",
        "nats a token",
        {"actor/entropy": "entropy"},
        "How undecided the policy is about a token. It falls while the policy learns; near 0 nothing new is tried.",
    ),
    Panel(
        "kl",
        "KL divergence",
        "nats a token",
        {
            "actor/ppo_kl": "from the policy before the step",
            "actor/kl_loss": "from the reference (loss)",
            "actor/reward_kl_penalty": "from the reference (reward)",
        },
        "How far an update moves the policy and, where a KL term is on, how far it has moved from the reference model.",
    ),
    Panel(
        "grad_norm",
        "Gradient norm",
        "norm before clipping",
        {"actor/grad_norm": "policy", "critic/grad_norm": "critic"},
        "Peaks that come again and again are a sign of too high a learning rate.",
        log=True,
    ),
    Panel(
        "clip_fraction",
        "Clipped by the loss",
        "share of the tokens",
        {"actor/pg_clipfrac": "clipped", "actor/pg_clipfrac_lower": "clipped from below"},
        "Tokens whose probability ratio left the trust region and that no longer push the policy.",
        share=True,
    ),
    Panel(
        "learning_rate",
        "Learning rate",
        "learning rate",
        {"actor/lr": "policy", "critic/lr": "critic"},
        "As the schedule sets it.",
    ),
    Panel(
        "critic_loss",
        "Loss of the critic",
        "value loss",
        {"critic/vf_loss": "value loss"},
        "It should fall while the critic learns what to expect.",
        "algorithm.adv_estimator has no critic",
    ),
    Panel(
        "critic_explained",
        "What the critic explains",
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
        "The engine and the trainer give the same token different probabilities: number formats, kernels, quantized "
        "weights. The mean should stay low and level; a steady rise can end a run.",
        _NO_LOG_PROBS,
        log=True,
    ),
    Panel(
        "rollout_kl",
        "KL divergence of rollout and trainer",
        "nats a token",
        {"rollout_corr/k3_kl": "k3 estimate"},
        "The same distance as one number a step. Where it grows, algorithm.rollout_correction makes up for it.",
        _NO_LOG_PROBS,
        log=True,
    ),
    Panel(
        "importance_weights",
        "Correction: importance weights",
        "weight of a token",
        {"rollout_corr/rollout_is_mean": "mean", "rollout_corr/rollout_is_max": "largest"},
        "What each token's loss is multiplied by. A mean far from 1 says that the two policies have parted.",
        f"{_NO_CORRECTION}: rollout_is is null",
    ),
    Panel(
        "effective_samples",
        "Correction: effective sample size",
        "share of the tokens",
        {"rollout_corr/rollout_is_eff_sample_size": "effective"},
        "How much of the batch is left once some tokens weigh more than others. Near 100 % nothing is lost.",
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
        "What is left out of the update since the two policies are too far apart on it.",
        f"{_NO_CORRECTION}: rollout_rs is null",
        share=True,
    ),
    Panel(
        "staleness",
        "Age of the weights that generated",
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
        "Steps with a validation in them take longer.",
    ),
    Panel(
        "throughput",
        "Throughput",
        "tokens a second and device",
        {"perf/throughput": "tokens a second"},
        "Tokens of prompts and responses, over the whole step.",
    ),
    Panel(
        "memory",
        "Memory of the trainer",
        "GiB, peak of a rank",
        {"actor/perf/max_memory_allocated_gb": "policy", "critic/perf/max_memory_allocated_gb": "critic"},
        "The most that any rank has used so far. A curve that never levels off is a leak.",
        from_zero=True,
    ),
)
MAX_SOURCES = 6


def validation(runs: Sequence[Run]) -> tuple[Panel, ...]:
    """A panel for each of the first `MAX_SOURCES` data sources: mean and best of the variables that count."""
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
            curves.setdefault(source, {})[name] = f"{variable}, {of if number != '1' else 'one sample'}"
    return tuple(
        Panel(
            f"validation_{number}" if number else "validation",
            f"Validation: {source}",
            "mean over the prompts",
            of_source,
            "On prompts that are not trained on. Trust this curve rather than the reward in training.",
            markers=True,
        )
        for number, (source, of_source) in enumerate(sorted(curves.items())[:MAX_SOURCES])
    )
