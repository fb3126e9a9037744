"""Validation metrics under the names of upstream verl: mean@N, best@N, worst@N and maj@N by data source.

N is the number of samples of a prompt. Every statistic is computed per prompt and then averaged over the prompts of a
data source, so that every prompt has the same weight.
"""

import numbers
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

N_BOOTSTRAP = 1000
Nested = dict[str, dict[str, dict[str, float]]]


def validation_variables(
    data_sources: Sequence[str],
    scores: Sequence[float],
    extras: Sequence[Mapping[str, Any]],
    failed: Sequence[bool],
) -> tuple[dict[str, list[Any]], list[str]]:
    """Build the columns for `process_validation_metrics` from the scores and the extra values of the samples.

    `reward` is the score. Extra values keep their names. In a data source where a name has numbers, a sample without
    the name, or with None, counts as 0.0: a mean over the other samples only would be too good if, for example, the
    name is left out for wrong answers. In other data sources the name is None for every sample.

    A data source without any extra values (its scorer returned dicts with nothing but `score`, or every sample failed)
    gets the score as `acc`.

    Args:
        data_sources: [S] data source of each sample.
        scores: [S] score of each sample.
        extras: [S] extra values that the scorer returned, possibly empty.
        failed: [S] True if the scoring of the sample failed, so that it has no extra values.

    Returns:
        the columns [S] by name, and notes for the user on values that are missing or not all numbers.

    Raises:
        ValueError: the arguments have different lengths.
    """
    if not len(scores) == len(extras) == len(data_sources) == len(failed):
        raise ValueError(
            f"extras: {len(extras)} entries for {len(scores)} scores, {len(data_sources)} data sources and "
            f"{len(failed)} failures; pass one of each per sample"
        )
    with_extras = {source for source, extra in zip(data_sources, extras, strict=True) if extra}
    complete = [
        extra if source in with_extras else {"acc": float(score)}
        for source, extra, score in zip(data_sources, extras, scores, strict=True)
    ]
    names = dict.fromkeys(name for extra in complete for name in extra)
    variables: dict[str, list[Any]] = {"reward": [float(score) for score in scores]}
    variables |= {name: [extra.get(name) for extra in complete] for name in names if name != "reward"}
    notes = []
    for source in dict.fromkeys(data_sources):
        samples = [index for index, other in enumerate(data_sources) if other == source]
        for name, column in variables.items():
            notes += _fill_missing(column, samples, failed, f"{name} for some samples of data_source={source}", name)
    return variables, notes


def _fill_missing(column: list[Any], samples: Sequence[int], failed: Sequence[bool], some: str, name: str) -> list[str]:
    """Set the missing numbers of one data source to 0.0 in place; return at most one note for the user.

    Args:
        column: [S], modified.
        samples: indices of the data source.
        failed: [S] True if the scoring of the sample failed.
        some: name and data source, for the note.
        name: name of the variable.
    """
    numeric = [_is_number(column[index]) for index in samples if column[index] is not None]
    if not any(numeric):
        return []
    if not all(numeric):
        return [
            f"validation: the reward function returned a number as {some} and another type for others; {name} is left "
            "out of the metrics. Return a number with every sample"
        ]
    missing = [index for index in samples if column[index] is None]
    for index in missing:
        column[index] = 0.0
    if all(failed[index] for index in missing):
        return []
    return [
        f"validation: the reward function returned no {some}; they count as 0 in the metrics of {name}. Return {name} "
        "with every sample"
    ]


def repeated_prompts_note(prompts: Mapping[str, tuple[str, str]]) -> list[str]:
    """Return a note for the user on each data source in which several rows have the same prompt.

    Args:
        prompts: the data source and the prompt of each row, by the row's uid.
    """
    notes = []
    rows, different = Counter(source for source, _ in prompts.values()), Counter(s for s, _ in set(prompts.values()))
    for source, count in rows.items():
        if different[source] < count:
            notes.append(
                f"validation: {count} rows of data_source={source} have {different[source]} different prompts. Each "
                "row counts as a prompt of its own. For best@N and maj@N over the samples of a problem, keep one row "
                "of it and set actor_rollout_ref.rollout.val_kwargs.n=N"
            )
    return notes


def subset_sizes(n: int) -> list[int]:
    """Return the sizes k of best@k, worst@k and maj@k: the powers of two below n, and n; empty for n = 1."""
    if n < 2:
        return []
    return [2**i for i in range(1, n.bit_length()) if 2**i < n] + [n]


def _draws(n: int, k: int, seed: int) -> np.ndarray:
    """Draw indices [N_BOOTSTRAP, k] in 0..n-1 with replacement: the same numbers as N_BOOTSTRAP calls for k each."""
    return np.random.RandomState(seed).choice(n, size=(N_BOOTSTRAP, k), replace=True)


def _majority(values: np.ndarray, votes: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Return the value [N_BOOTSTRAP] of the most frequent vote of each draw; ties go to the vote drawn first."""
    drawn = votes[draws]
    rows = np.arange(len(draws))[:, None]
    width = int(votes.max()) + 1
    counts = np.bincount((rows * width + drawn).ravel(), minlength=len(draws) * width).reshape(len(draws), width)
    # argmax returns the first maximum, which is the first draw of the winning vote.
    first = counts[rows, drawn].argmax(axis=1)
    return values[draws[rows[:, 0], first]]


def _codes(votes: Sequence[Any]) -> np.ndarray:
    """Map votes to small integers [n]; equal votes have equal integers."""
    known: dict[Hashable, int] = {}
    keys = (vote if isinstance(vote, Hashable) else repr(vote) for vote in votes)
    return np.array([known.setdefault(key, len(known)) for key in keys], dtype=np.int64)


def _prompt_statistics(
    values: Sequence[float], votes: Sequence[Any] | None, draws_of: Mapping[int, np.ndarray]
) -> dict[str, float]:
    """Return the statistics of one prompt (`process_validation_metrics`); `draws_of[k]` are indices into `values`."""
    array, n = np.asarray(values, dtype=np.float64), len(values)
    statistics = {f"mean@{n}": array.mean()}
    if n == 1:
        return statistics
    statistics[f"std@{n}"] = array.std()
    codes = None if votes is None else _codes(votes)
    for k, draws in draws_of.items():
        drawn = array[draws]
        subsets = {"best": drawn.max(axis=1), "worst": drawn.min(axis=1)}
        if codes is not None:
            subsets["maj"] = _majority(array, codes, draws)
        for name, outcome in subsets.items():
            statistics[f"{name}@{k}/mean"], statistics[f"{name}@{k}/std"] = outcome.mean(), outcome.std()
    return statistics


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real | np.bool_)


def process_validation_metrics(
    data_sources: Sequence[str], sample_uids: Sequence[str], infos_dict: Mapping[str, Sequence[Any]], seed: int = 42
) -> Nested:
    """Compute statistics by data source and variable.

    For a prompt with n samples, k over `subset_sizes(n)`:

    - mean@n, and for n > 1 std@n (ddof 0);
    - best@k/{mean,std} and worst@k/{mean,std}: largest and smallest of k samples drawn with replacement, over
      `N_BOOTSTRAP` draws. So best@n is below pass@n, which draws without replacement;
    - maj@k/{mean,std}, if `infos_dict` has the column `pred`: the value of the most frequent prediction among the k
      drawn. Ties go to the prediction drawn first; its first drawn sample gives the value.

    All prompts with the same number of samples use the same draws. They come from numpy's legacy generator, so the
    results equal those of upstream verl. A variable is used in the data sources where all of its values are
    numbers or booleans.

    Args:
        data_sources: [S] data source of each sample.
        sample_uids: [S] uid of the prompt of each sample; not its text, which several prompts may share.
        infos_dict: values [S] by variable name.
        seed: seed of the draws.

    Returns:
        {data source: {variable: {statistic: mean over prompts}}}.

    Raises:
        ValueError: a column and `data_sources` have different lengths; or a variable is None for some samples of a
            data source and a number for others, so that its mean would not be over all samples.
    """
    for name, column in {"sample_uids": sample_uids, **infos_dict}.items():
        if len(column) != len(data_sources):
            raise ValueError(f"{name}: {len(column)} values for {len(data_sources)} samples; pass one per sample")
    prompts: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, (source, uid) in enumerate(zip(data_sources, sample_uids, strict=True)):
        prompts[source][uid].append(index)
    draws: dict[int, dict[int, np.ndarray]] = {}
    result: Nested = {}
    for source, samples_of in prompts.items():
        result[source] = {}
        for name, column in infos_dict.items():
            if _is_numeric(name, [column[i] for samples in samples_of.values() for i in samples], source):
                result[source][name] = _mean_over_prompts(
                    samples_of.values(), column, infos_dict.get("pred"), draws, seed
                )
    return result


def _mean_over_prompts(
    prompts: Iterable[Sequence[int]],
    column: Sequence[Any],
    predictions: Sequence[Any] | None,
    draws: dict[int, dict[int, np.ndarray]],
    seed: int,
) -> dict[str, float]:
    """Average each statistic over the prompts that have it; `draws`, by number of samples, is filled as needed."""
    collected: dict[str, list[float]] = defaultdict(list)
    for samples in prompts:
        n = len(samples)
        if n not in draws:
            draws[n] = {k: _draws(n, k, seed) for k in subset_sizes(n)}
        votes = None if predictions is None else [predictions[i] for i in samples]
        for statistic, value in _prompt_statistics([column[i] for i in samples], votes, draws[n]).items():
            collected[statistic].append(value)
    return {statistic: float(np.mean(values)) for statistic, values in collected.items()}


def _is_numeric(name: str, values: Sequence[Any], source: str) -> bool:
    present = [value for value in values if value is not None]
    if not present or not all(_is_number(value) for value in present):
        return False
    if len(present) < len(values):
        raise ValueError(
            f"{name}: None for {len(values) - len(present)} of {len(values)} samples of data source {source!r}; pass a "
            "number for each, as validation_variables does"
        )
    return True


def flatten_validation_metrics(nested: Nested) -> dict[str, float]:
    """Turn the result of `process_validation_metrics` into metrics.

    The names are val-core/SOURCE/VAR/{mean@N,best@N/mean,maj@N/mean} for the largest N. VAR is `acc` if the source has
    it and `reward` otherwise. All other statistics are under val-aux/SOURCE/VAR/.
    """
    flat = {}
    for source, variables in nested.items():
        core_variable = "acc" if "acc" in variables else "reward"
        for variable, statistics in variables.items():
            largest = max(int(name.split("@")[1].split("/")[0]) for name in statistics)
            core_names = {f"mean@{largest}", f"best@{largest}/mean", f"maj@{largest}/mean"}
            for name, value in statistics.items():
                section = "val-core" if variable == core_variable and name in core_names else "val-aux"
                flat[f"{section}/{source}/{variable}/{name}"] = value
    return flat


def samples_table(
    inputs: Sequence[str], outputs: Sequence[str], scores: Sequence[float], n: int, seed: int = 42
) -> list[dict[str, Any]]:
    """Return at most `n` samples (`trainer.log_val_generations`) as rows with `input`, `output` and `score`.

    The samples are sorted by input and then shuffled with a fixed seed, so that every validation shows the same
    prompts, in any order of the samples.
    """
    rows = sorted(zip(inputs, outputs, scores, strict=True), key=lambda row: row[0])
    np.random.RandomState(seed).shuffle(rows)
    return [{"input": text, "output": response, "score": float(score)} for text, response, score in rows[: max(n, 0)]]
