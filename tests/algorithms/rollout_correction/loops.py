"""Reference of the rollout correction: weights, rejection and metrics, token by token in Python floats."""

import math

import torch


def make_batch(seed=0):
    """log pi, log mu [10, 7] float64 and a mask [10, 7] int64; values outside the mask are NaN or -inf."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    log_mu = -normal(10, 7).abs() - 0.01
    d = 0.3 * normal(10, 7)
    mask = torch.ones(10, 7, dtype=torch.int64)
    d[0] *= 1e-3
    d[2], d[3] = 0.1, -0.1
    d[4, 0], mask[4, 1:] = math.log(1.8), 0
    mask[5] = 0
    d[6, 0], d[7, 2] = 100.0, -100.0
    d[8], mask[8, 2:4], mask[8, 6:] = normal(7), 0, 0
    d[9] = 0.0
    mask[0, 5:] = 0
    log_pi = log_mu + d
    log_pi[mask == 0], log_mu[mask == 0] = float("-inf"), float("nan")
    return log_pi, log_mu, mask


def rows_of(log_pi, log_mu, mask):
    """For each sequence, (log pi, log mu) of its tokens."""
    zipped = zip(log_pi.tolist(), log_mu.tolist(), mask.tolist(), strict=True)
    return [[(p, q) for p, q, m in zip(*row, strict=True) if m] for row in zipped]


def spread(rows, mask):
    """Put the values of the tokens of each sequence into a tensor in the layout of `mask`, 0 elsewhere."""
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for i, row in enumerate(rows):
        columns = [j for j in range(mask.shape[1]) if mask[i, j]]
        for j, value in zip(columns, row, strict=True):
            out[i, j] = value
    return out


def mean(values):
    return math.fsum(values) / len(values) if values else 0.0


def std(values):
    if len(values) < 2:
        return 0.0
    center = mean(values)
    return math.sqrt(math.fsum((v - center) ** 2 for v in values) / (len(values) - 1))


def population_std(values):
    center = mean(values)
    return math.sqrt(mean([(v - center) ** 2 for v in values]))


def clamped(x):
    return min(max(x, -20.0), 20.0)


def raw_weights(rows, level):
    if level == "token":
        return [[math.exp(clamped(p - q)) for p, q in row] for row in rows]
    return [[math.exp(clamped(math.fsum(p - q for p, q in row)))] * len(row) for row in rows]


def weights(rows, level, lo, hi, zero):
    """Bounded weights: 0 outside [lo, hi] with `zero`, else at most hi."""
    found = raw_weights(rows, level)
    if zero:
        return [[w if lo <= w <= hi else 0.0 for w in row] for row in found]
    return [[min(w, hi) for w in row] for row in found]


def factor(bounded, level):
    means = [mean(row) for row in bounded if row] if level == "sequence" else [w for row in bounded for w in row]
    return mean(means) if mean(means) > 1e-8 else 1.0


def token_statistic(p, q, estimator):
    d = p - q
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d * d / 2
    if estimator == "k3":
        return math.exp(clamped(d)) - 1 - clamped(d)
    a, b = (min(max(math.exp(x), 1e-6), 1 - 1e-6) for x in (p, q))
    forward = a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))
    backward = b * math.log(b / a) + (1 - b) * math.log((1 - b) / (1 - a))
    return max(forward, backward)


def statistic(rows, term):
    """The value that `term` compares with its bounds, for each token of each sequence."""
    level, estimator = ("token", term) if term == "binary_kl" else term.rsplit("_", 1)
    values = [[token_statistic(p, q, estimator) for p, q in row] for row in rows]
    pool = {"token": None, "seq_sum": math.fsum, "seq_mean": mean, "seq_max": max}[level]
    return values if pool is None else [[pool(row)] * len(row) if row else [] for row in values]


def within(value, term, lo, hi):
    """True if a value is within the bounds; for k1 they are bounds of the ratio."""
    return lo <= math.exp(min(value, 700.0)) <= hi if term.endswith("k1") else value <= hi


def kept(rows, terms):
    """For each token of each sequence, True if all `terms`, each (term, lo, hi), keep it."""
    result = [[True] * len(row) for row in rows]
    for term, lo, hi in terms:
        values = statistic(rows, term)
        result = [
            [k and within(v, term, lo, hi) for k, v in zip(*pair, strict=True)]
            for pair in zip(result, values, strict=True)
        ]
    return result


def weight_metrics(rows, level, lo, hi, zero, normalize=False):
    raw, bounded = raw_weights(rows, level), weights(rows, level, lo, hi, zero)
    tokens, raw_tokens = ([w for row in x for w in row] for x in (bounded, raw))
    sequences, raw_sequences = ([mean(row) for row in x if row] for x in (bounded, raw))
    extremes = raw_sequences if level == "sequence" else tokens
    compared = raw_sequences if level == "sequence" else raw_tokens
    found = {
        "mean": mean(tokens),
        "std": population_std(tokens),
        "max": max(extremes),
        "min": min(extremes),
        "eff_sample_size": math.fsum(tokens) ** 2 / (len(tokens) * math.fsum(w * w for w in tokens)),
        "ratio_fraction_high": mean([float(w > hi) for w in compared]),
        "ratio_fraction_low": mean([float(w < lo) for w in compared]),
        "seq_mean": mean(sequences),
        "seq_std": std(sequences),
        "seq_max": max(sequences),
        "seq_min": min(sequences),
        "seq_max_deviation": max(abs(w - 1) for w in sequences),
        "seq_fraction_high": mean([float(w > hi) for w in raw_sequences]),
        "seq_fraction_low": mean([float(w < lo) for w in raw_sequences]),
    }
    if zero:
        found["oob_ratio"] = mean([float(not lo <= w <= hi) for w in raw_tokens])
    if normalize:
        found["batch_norm_factor"] = factor(bounded, level)
    return {f"rollout_corr/rollout_is_{name}": value for name, value in found.items()}


def rejection_metrics(rows, terms):
    found = {}
    for term, lo, hi in terms:
        low, high = (math.log(lo), math.log(hi)) if term.endswith("k1") else (-math.inf, hi)
        values = statistic(rows, term)
        tokens, sequences = [v for row in values for v in row], [mean(row) for row in values if row]
        own = sequences if term.startswith("seq") else tokens
        term_values = {
            "mean": mean(tokens),
            "std": population_std([min(max(v, low), high) for v in tokens]),
            "max": max(own),
            "min": min(own),
            "fraction_high": mean([float(v > high) for v in own]),
            "fraction_low": mean([float(v < low) for v in own]),
            "seq_mean": mean(sequences),
            "seq_std": std(sequences),
            "seq_max": max(sequences),
            "seq_min": min(sequences),
            "seq_max_deviation": max(abs(v) for v in sequences),
            "seq_fraction_high": mean([float(v > high) for v in sequences]),
            "seq_fraction_low": mean([float(v < low) for v in sequences]),
        }
        found |= {f"{term}_{name}": value for name, value in term_values.items()}
        found |= {f"{term}_{name}": value for name, value in _shares(kept(rows, [(term, lo, hi)])).items()}
    found |= _shares(kept(rows, terms)) if terms else {}
    return {f"rollout_corr/rollout_rs_{name}": value for name, value in found.items()}


def _shares(keep):
    return {
        "masked_fraction": mean([float(not k) for row in keep for k in row]),
        "seq_masked_fraction": mean([float(not all(row)) for row in keep if row]),
    }
