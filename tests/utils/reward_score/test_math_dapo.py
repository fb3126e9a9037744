"""DAPO's scorer under upstream verl's name: keys and rewards of arXiv:2503.14476, section 2.4."""

import pytest

from verl.utils.reward_score import default_compute_score, math_dapo


@pytest.mark.parametrize(
    ("response", "truth", "score", "pred"),
    [
        ("Let me see.\nAnswer: 34", "34", 1.0, "34"),
        ("Answer: 33\nNo.\nAnswer: 34", "34", 1.0, "34"),
        ("Answer: 34\nNo.\nAnswer: 33", "34", -1.0, "33"),
        ("answer: $1,000$", "1000", 1.0, "1000"),
        ("Answer: -1,234,567.5", "-1234567.5", 1.0, "-1234567.5"),
        ("Answer: (1,000, 2)", "(1000, 2)", 1.0, "(1,000, 2)"),
        ("Answer: 1,2", "12", -1.0, "1,2"),
        ("**Answer:** 7", "7", 1.0, "7"),
        (r"Answer: \boxed{7}", "7", 1.0, "7"),
        (r"so \boxed{7}", "7", 1.0, "7"),
        ("I do not know", "7", -1.0, "[INVALID]"),
        ("", "7", -1.0, "[INVALID]"),
        ("The result is 7", "7", -1.0, "[INVALID]"),
    ],
)
def test_a_right_answer_is_one_and_any_other_minus_one(response, truth, score, pred):
    assert math_dapo.compute_score(response, truth) == {"score": score, "acc": score > 0, "pred": pred}


def test_the_result_is_the_one_of_the_data_source():
    for response in ("Answer: 34", "Answer: 35", "34"):
        direct = math_dapo.compute_score(response, "34")
        assert type(direct["acc"]) is bool and type(direct["score"]) is float
        assert default_compute_score("math_dapo", response, "34") == direct


def test_an_empty_ground_truth_is_an_error():
    with pytest.raises(ValueError, match="has no answer"):
        math_dapo.compute_score("Answer: 1", "")
