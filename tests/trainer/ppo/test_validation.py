"""Validation metrics compared with a slow reference: Python loops, one bootstrap draw at a time."""

import random
from collections import Counter

import numpy as np
import pytest

from verl.trainer.ppo.validation import (
    flatten_validation_metrics,
    process_validation_metrics,
    repeated_prompts_note,
    samples_table,
    subset_sizes,
    validation_variables,
)


def slow_bootstrap(items, k, reduce, seed):
    np.random.seed(seed)
    outcomes = [reduce([items[i] for i in np.random.choice(len(items), size=k, replace=True)]) for _ in range(1000)]
    mean = sum(outcomes) / 1000
    return mean, (sum((x - mean) ** 2 for x in outcomes) / 1000) ** 0.5


def slow_majority(items):
    counts = Counter(vote for _, vote in items)
    top = max(counts.values())
    winner = next(vote for _, vote in items if counts[vote] == top)
    return next(value for value, vote in items if vote == winner)


def slow_prompt(values, votes, seed):
    n = len(values)
    mean = sum(values) / n
    result = {f"mean@{n}": mean}
    if n > 1:
        result[f"std@{n}"] = (sum((v - mean) ** 2 for v in values) / n) ** 0.5
    for k in sorted({2**i for i in range(1, 20) if 2**i < n} | ({n} if n > 1 else set())):
        for name, reduce in (("best", max), ("worst", min)):
            result[f"{name}@{k}/mean"], result[f"{name}@{k}/std"] = slow_bootstrap(values, k, reduce, seed)
        if votes is not None:
            pairs = list(zip(values, votes, strict=True))
            result[f"maj@{k}/mean"], result[f"maj@{k}/std"] = slow_bootstrap(pairs, k, slow_majority, seed)
    return result


def slow_process(sources, uids, infos, seed):
    result = {}
    for source in set(sources):
        result[source] = {}
        for name in (name for name in infos if name != "pred"):
            per_prompt = []
            for uid in {u for u, s in zip(uids, sources, strict=True) if s == source}:
                rows = [i for i in range(len(uids)) if uids[i] == uid and sources[i] == source]
                votes = [infos["pred"][i] for i in rows] if "pred" in infos else None
                per_prompt.append(slow_prompt([float(infos[name][i]) for i in rows], votes, seed))
            names = {metric for metrics in per_prompt for metric in metrics}
            result[source][name] = {}
            for metric in names:
                values = [metrics[metric] for metrics in per_prompt if metric in metrics]
                result[source][name][metric] = sum(values) / len(values)
    return result


def make_set(counts, seed=0, with_pred=True):
    """Build a set with `counts` = {source: [samples of each prompt]}; rows are shuffled."""
    rng = random.Random(seed)
    rows = []
    for source, samples in counts.items():
        for prompt, n in enumerate(samples):
            for _ in range(n):
                rows.append((source, f"{source}-{prompt}", rng.random(), rng.random() < 0.5, rng.choice("ABC")))
    rng.shuffle(rows)
    sources, uids, rewards, accs, preds = (list(column) for column in zip(*rows, strict=True))
    return sources, uids, {"reward": rewards, "acc": accs} | ({"pred": preds} if with_pred else {})


@pytest.mark.parametrize(
    ("counts", "seed", "with_pred"),
    [
        ({"a": [5, 5, 5], "b": [8, 8]}, 42, True),
        ({"a": [1, 1, 1]}, 42, True),
        ({"a": [2], "b": [3, 6]}, 7, False),
    ],
)
def test_statistics_match_the_slow_reference(counts, seed, with_pred):
    sources, uids, infos = make_set(counts, with_pred=with_pred)
    fast = process_validation_metrics(sources, uids, infos, seed=seed)
    slow = slow_process(sources, uids, infos, seed)
    assert fast.keys() == slow.keys()
    for source in slow:
        assert fast[source].keys() == slow[source].keys()
        for name in slow[source]:
            assert fast[source][name] == pytest.approx(slow[source][name], rel=1e-12, abs=1e-12)


def test_best_of_n_is_close_to_its_expectation():
    # One success among 4: P(at least one in 4 draws with replacement) = 1 - 0.75^4.
    result = process_validation_metrics(["d"] * 4, ["u"] * 4, {"acc": [1, 0, 0, 0]})["d"]["acc"]
    assert result["best@4/mean"] == pytest.approx(1 - 0.75**4, abs=0.04)
    assert result["worst@4/mean"] == pytest.approx(0.25**4, abs=0.02)


def test_majority_ties_go_to_the_vote_drawn_first():
    result = process_validation_metrics(["d"] * 2, ["u"] * 2, {"acc": [1.0, 0.0], "pred": ["A", "B"]})["d"]["acc"]
    # AA, AB -> A has value 1; BA, BB -> B has value 0.
    assert result["maj@2/mean"] == pytest.approx(0.5, abs=0.06)


def test_subset_sizes_are_powers_of_two_and_n():
    sizes = {1: [], 2: [2], 3: [2, 3], 4: [2, 4], 5: [2, 4, 5], 8: [2, 4, 8], 9: [2, 4, 8, 9]}
    assert {n: subset_sizes(n) for n in sizes} == sizes


def test_text_is_ignored_by_data_source_and_lists_can_vote():
    infos = {"note": list("wxyz"), "mixed": [1, 2, "a", "b"], "gone": [None] * 4, "pred": [["x"], None, ["x"], ["y"]]}
    result = process_validation_metrics(["d", "d", "e", "e"], ["u", "u", "v", "v"], infos)
    assert set(result["d"]) == {"mixed"} and not result["e"]
    assert result["d"]["mixed"]["mean@2"] == 1.5 and "maj@2/mean" in result["d"]["mixed"]


def test_a_value_that_some_samples_lack_is_rejected():
    with pytest.raises(ValueError, match="acc: None for 1 of 2 samples of data source 'd'"):
        process_validation_metrics(["d", "d"], ["u", "u"], {"acc": [1, None]})


def test_an_empty_set_gives_no_metrics_and_a_short_column_is_rejected():
    assert process_validation_metrics([], [], {"reward": []}) == {}
    with pytest.raises(ValueError, match="acc: 1 values for 2 samples"):
        process_validation_metrics(["d", "d"], ["u", "u"], {"acc": [1]})


def test_metric_names_of_core_and_aux():
    sources, uids, infos = make_set({"gsm8k": [4, 4]})
    flat = flatten_validation_metrics(process_validation_metrics(sources, uids, infos))
    core = {name for name in flat if name.startswith("val-core/")}
    assert core == {f"val-core/gsm8k/acc/{m}" for m in ("mean@4", "best@4/mean", "maj@4/mean")}
    aux = {"acc/std@4", "acc/best@2/mean", "acc/best@4/std", "acc/worst@4/mean", "reward/mean@4", "reward/maj@4/mean"}
    assert {f"val-aux/gsm8k/{m}" for m in aux} <= flat.keys()
    assert all(name in core or name.startswith("val-aux/gsm8k/") for name in flat)


def test_reward_is_the_core_variable_without_acc():
    nested = process_validation_metrics(["d"] * 16, ["u"] * 16, {"reward": list(range(16))})
    core = {name for name in flatten_validation_metrics(nested) if name.startswith("val-core/")}
    assert core == {"val-core/d/reward/mean@16", "val-core/d/reward/best@16/mean"}


def test_validation_variables_fill_missing_values_by_data_source():
    # a: only failures and bare scores; b: dicts with acc, one failed; c: dicts without acc, one failed.
    sources = ["a", "a", "b", "b", "c", "c"]
    extras = [{}, {}, {"acc": True, "pred": "7"}, {}, {"format": 1.0}, {}]
    failed = [False, True, False, True, False, True]
    variables, notes = validation_variables(sources, [0.5, 0.0, 1.0, 0.0, 0.25, 0.0], extras, failed)
    assert variables == {
        "reward": [0.5, 0.0, 1.0, 0.0, 0.25, 0.0],
        "acc": [0.5, 0.0, True, 0.0, None, None],
        "pred": [None, None, "7", None, None, None],
        "format": [None, None, None, None, 1.0, 0.0],
    }
    assert notes == []
    assert "acc" not in validation_variables(["c"], [1.0], [{"format": 1.0}], [False])[0]
    with pytest.raises(ValueError, match="1 entries for 2 scores"):
        validation_variables(["a", "a"], [1.0, 2.0], [{}], [False, False])


@pytest.mark.parametrize("absent", [{}, {"acc": None}, {"other": 3}])
def test_a_mean_counts_the_samples_for_which_the_reward_function_left_a_value_out(absent):
    # 10 prompts of 4 samples; acc only for the right ones: all 4 of the first prompt.
    extras = [{"acc": 1.0} if index < 4 else absent for index in range(40)]
    sources, uids = ["d"] * 40, [f"0.{index // 4}" for index in range(40)]
    scores = [float(index < 4) for index in range(40)]
    variables, notes = validation_variables(sources, scores, extras, [False] * 40)
    flat = flatten_validation_metrics(process_validation_metrics(sources, uids, variables))
    assert flat["val-core/d/acc/mean@4"] == flat["val-aux/d/reward/mean@4"] == pytest.approx(0.1)
    assert {name for name in flat if "acc/mean@" in name} == {"val-core/d/acc/mean@4"}
    assert "returned no acc for some samples of data_source=d; they count as 0" in notes[0]


def test_a_value_that_is_a_number_or_text_is_left_out_with_a_note():
    variables, notes = validation_variables(["d"] * 2, [0.0, 1.0], [{"acc": 1.0}, {"acc": "no"}], [False] * 2)
    assert process_validation_metrics(["d"] * 2, ["u", "v"], variables)["d"].keys() == {"reward"}
    assert len(notes) == 1 and "a number as acc for some samples of data_source=d" in notes[0]


def test_repeated_prompts_are_noted_by_data_source():
    prompts = {f"0.{index}": ("aime", f"problem {index % 30}") for index in range(960)}
    prompts |= {"1.0": ("gsm8k", "problem 0")}
    (note,) = repeated_prompts_note(prompts)
    assert "960 rows of data_source=aime have 30 different prompts" in note and "val_kwargs.n=N" in note


def test_the_samples_table_does_not_depend_on_the_order_of_the_samples():
    inputs = [f"q{i}" for i in range(10)]
    order = list(range(10))
    random.Random(3).shuffle(order)
    table = samples_table(inputs, [f"a{i}" for i in range(10)], list(range(10)), n=3)
    other = samples_table([inputs[i] for i in order], [f"a{i}" for i in order], order, n=3)
    assert table == other and len(table) == 3 and set(table[0]) == {"input", "output", "score"}
    assert samples_table(inputs, inputs, list(range(10)), n=0) == []
    assert len(samples_table(inputs, inputs, list(range(10)), n=99)) == 10
