"""Validation scores under verl's names (mean@N, best@N, worst@N, maj@N by data source), and dumps of the samples.

N is the number of samples of one prompt. Every statistic is taken for each prompt first and then averaged over the
prompts of a data source, so that a prompt counts once however many samples it has.
"""

import numbers
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

N_BOOTSTRAP = 1000
SAMPLE_COLUMNS = ("input", "output", "gts", "score")

Nested = dict[str, dict[str, dict[str, float]]]


def validation_variables(
    data_sources: Sequence[str], scores: Sequence[float], extras: Sequence[Mapping[str, Any]]
) -> dict[str, list[Any]]:
    """Columns for `process_validation_metrics` from one score and one dict of extra values a sample.

    `reward` is the score. Other extra values keep their names; a sample without one gets None. A sample without any
    extra value (its scorer returned a plain number, or failed) gets the score as `acc`, unless other samples of its
    data source report values and `acc` is not among them: there `acc` would tell about the failures only.

    Args:
        data_sources: [S] data source of each sample.
        scores: [S] one score a sample.
        extras: [S] what the scorer returned besides the score, possibly empty.

    Raises:
        ValueError: the three do not have the same length.
    """
    if not len(scores) == len(extras) == len(data_sources):
        raise ValueError(
            f"extras: {len(extras)} entries for {len(scores)} scores and {len(data_sources)} data sources; "
            "give one of each a sample"
        )
    names = dict.fromkeys(name for extra in extras for name in extra)
    variables: dict[str, list[Any]] = {"reward": [float(score) for score in scores]}
    variables |= {name: [extra.get(name) for extra in extras] for name in names if name != "reward"}
    without_acc = {source for source, extra in zip(data_sources, extras, strict=True) if extra and "acc" not in extra}
    accuracy = [
        float(score) if not extra and source not in without_acc else extra.get("acc")
        for source, score, extra in zip(data_sources, scores, extras, strict=True)
    ]
    if any(value is not None for value in accuracy):
        variables["acc"] = accuracy
    return variables


def subset_sizes(n: int) -> list[int]:
    """Sizes k for which best@k, worst@k and maj@k are reported: the powers of two below n, and n; none for n = 1."""
    if n < 2:
        return []
    return [2**i for i in range(1, n.bit_length()) if 2**i < n] + [n]


def _draws(n: int, k: int, seed: int) -> np.ndarray:
    """[N_BOOTSTRAP, k] indices below n with replacement: the same numbers as N_BOOTSTRAP draws of k, one by one."""
    return np.random.RandomState(seed).choice(n, size=(N_BOOTSTRAP, k), replace=True)


def _majority(values: np.ndarray, votes: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """[N_BOOTSTRAP] value of the most frequent vote of each draw; of votes equally frequent, the one drawn first."""
    drawn = votes[draws]
    rows = np.arange(len(draws))[:, None]
    width = int(votes.max()) + 1
    counts = np.bincount((rows * width + drawn).ravel(), minlength=len(draws) * width).reshape(len(draws), width)
    # argmax returns the first of equals, which is the first draw of the winning vote.
    first = counts[rows, drawn].argmax(axis=1)
    return values[draws[rows[:, 0], first]]


def _codes(votes: Sequence[Any]) -> np.ndarray:
    """[n] small integers, equal where the votes are equal."""
    known: dict[Hashable, int] = {}
    keys = (vote if isinstance(vote, Hashable) else repr(vote) for vote in votes)
    return np.array([known.setdefault(key, len(known)) for key in keys], dtype=np.int64)


def _prompt_statistics(
    values: Sequence[float], votes: Sequence[Any] | None, draws_of: Mapping[int, np.ndarray]
) -> dict[str, float]:
    """Statistics of one prompt. `draws_of[k]` holds indices into `values`; see `process_validation_metrics`."""
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
    """Statistics by data source and variable.

    For a prompt with n samples, k over `subset_sizes(n)`:

    - mean@n, and for n > 1 std@n (ddof 0);
    - best@k/{mean,std} and worst@k/{mean,std}: largest and smallest of k samples drawn with replacement, over
      `N_BOOTSTRAP` draws. best@n is therefore below pass@n, which draws without replacement;
    - maj@k/{mean,std}, if `infos_dict` has the column `pred`: the value of the most frequent prediction among the k
      drawn. Of predictions equally frequent the one drawn first wins; its first drawn sample gives the value.

    Every prompt with as many samples uses the same draws, made from `seed`; they are numpy's legacy stream, so the
    numbers equal upstream verl's. A variable is taken where its values are numbers or booleans: a column with text is
    left out, a None leaves that sample out of that variable.

    Args:
        data_sources: [S] data source of each sample.
        sample_uids: [S] prompt (its uid, or its text) of each sample.
        infos_dict: variable name to [S] values.
        seed: of the draws.

    Returns:
        {data source: {variable: {statistic: mean over prompts}}}.

    Raises:
        ValueError: a column has another length than `data_sources`.
    """
    for name, column in {"sample_uids": sample_uids, **infos_dict}.items():
        if len(column) != len(data_sources):
            raise ValueError(f"{name}: {len(column)} values for {len(data_sources)} samples; give one a sample")
    prompts: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, (source, uid) in enumerate(zip(data_sources, sample_uids, strict=True)):
        prompts[source][uid].append(index)
    numeric = {name: column for name, column in infos_dict.items() if _numeric_column(column)}
    draws: dict[int, dict[int, np.ndarray]] = {}
    result: Nested = {}
    for source, samples_of in prompts.items():
        result[source] = {}
        for name, column in numeric.items():
            statistics = _mean_over_prompts(samples_of.values(), column, infos_dict.get("pred"), draws, seed)
            if statistics:
                result[source][name] = statistics
    return result


def _mean_over_prompts(
    prompts: Iterable[Sequence[int]],
    column: Sequence[Any],
    predictions: Sequence[Any] | None,
    draws: dict[int, dict[int, np.ndarray]],
    seed: int,
) -> dict[str, float]:
    """Each statistic's mean over the prompts that have it; `draws`, by number of samples, is filled as needed."""
    collected: dict[str, list[float]] = defaultdict(list)
    for samples in prompts:
        present = [i for i in samples if column[i] is not None]
        if not present:
            continue
        n = len(present)
        if n not in draws:
            draws[n] = {k: _draws(n, k, seed) for k in subset_sizes(n)}
        votes = None if predictions is None else [predictions[i] for i in present]
        for statistic, value in _prompt_statistics([column[i] for i in present], votes, draws[n]).items():
            collected[statistic].append(value)
    return {statistic: float(np.mean(values)) for statistic, values in collected.items()}


def _numeric_column(column: Sequence[Any]) -> bool:
    present = [value for value in column if value is not None]
    return bool(present) and all(_is_number(value) for value in present)


def flatten_validation_metrics(nested: Nested) -> dict[str, float]:
    """Metric names of `process_validation_metrics`' result.

    val-core/SOURCE/VAR/{mean@N,best@N/mean,maj@N/mean} for the largest N, where VAR is `acc` if the source has it and
    `reward` otherwise; everything else under val-aux/SOURCE/VAR/.
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
    """At most `n` samples (`trainer.log_val_generations`) as rows with `input`, `output` and `score`.

    The samples are sorted by input and then picked with a fixed seed: a validation set in another order, and the next
    validation, show the same prompts.
    """
    rows = sorted(zip(inputs, outputs, scores, strict=True), key=lambda row: row[0])
    np.random.RandomState(seed).shuffle(rows)
    return [{"input": text, "output": answer, "score": float(score)} for text, answer, score in rows[: max(n, 0)]]
