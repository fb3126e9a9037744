"""Equality of answers: limits, and properties over the answers of the table in `tests/data/reward_answers.jsonl`."""

import json
import re
from pathlib import Path

import pytest

from verl.utils.reward_score.answer_equal import answers_equal
from verl.utils.reward_score.answer_text import MAX_CHARACTERS, canonical

TABLE = Path(__file__).parents[2] / "data" / "reward_answers.jsonl"
PAIRS = [
    (re.fullmatch(r"Therefore the answer is \$\\boxed\{(.*)\}\$\.", row["response"])[1], row["truth"])
    for row in map(json.loads, TABLE.read_text().splitlines())
    if row["source"] == "lighteval/MATH" and row["response"].startswith("Therefore the answer is")
]


@pytest.mark.parametrize(("answer", "truth"), PAIRS)
def test_equality_is_symmetric_and_reflexive_and_survives_canonical_text(answer, truth):
    equal = answers_equal(answer, truth)
    # A set of numbers equals the inequality that describes it only if the inequality is the truth.
    if "<" not in truth:
        assert answers_equal(truth, answer) is equal
    assert answers_equal(answer, answer) and answers_equal(truth, truth)
    assert canonical(canonical(answer)) == canonical(answer)


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("[1, 2, [3, 4]]", "[1,2,[3,4]]"),
        (r"(1, \{2, 3\})", r"(1, \{3, 2\})"),
        (r"1,000 \text{ and } 2,000", "1000, 2000"),
        ("100, 200, 300", "100,200,300"),
        ("x = 1 or x = 2", "1, 2"),
        ("7 meters", r"7\text{ m}"),
        ("3 1/4", "13/4"),
        (r"\frac{10}{4}", "2.5"),
        (r"2.5\%", "0.025"),
        ("a very long text " * 200, "a very long text " * 200),
    ],
)
def test_equal(answer, truth):
    assert answers_equal(answer, truth) and answers_equal(truth, answer)


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("", ""),
        ("", "0"),
        ("$", "0"),
        ("(1, 2, 3)", "(1, 2)"),
        ("7 km", "7 m"),
        ("7 minutes", "7 hours"),
        ("1/0", "0"),
        ("1/0", "2/0"),
        ("3 1/0", "3"),
        (r"2\%", "0.2"),
        (r"\{1, 1\}", r"\{1, 2\}"),
        ("0" * (MAX_CHARACTERS + 1) + "7", "7"),
    ],
)
def test_not_equal(answer, truth):
    assert not answers_equal(answer, truth) and not answers_equal(truth, answer)


@pytest.mark.parametrize(
    "answer",
    [
        "(" * 900 + "5" + ")" * 900,
        r"\frac{1}{" * 200 + "2" + "}" * 200,
        r"\sqrt{" * 200 + "2" + "}" * 200,
        "1+" * 900 + "1",
        "9" * 1900,
        r"\bm{" * 300 + "5" + "}" * 300,
        "1 " * 900,
        r"\begin{pmatrix}",
        r"\frac{}{}",
        r"\left(",
        "_{" * 500,
        "{" * 900 + "}" * 900,
    ],
)
def test_hostile_answers_end_soon_and_are_wrong(answer):
    assert not answers_equal(answer, "42") and not answers_equal(answer, r"x^2+\sqrt{2}")
