"""GSM8K scorer: the number that counts, and its comparison."""

import pytest

from verl.utils.reward_score import default_compute_score
from verl.utils.reward_score.gsm8k import compute_score


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("6 * 7 = 42\n#### 42", "42", 1.0),
        ("#### 1,000", "1000", 1.0),
        ("#### 1000", "1,000", 1.0),
        ("#### $1,000.00", "1000", 1.0),
        ("#### -5", "-5", 1.0),
        ("#### \u22125", "-5", 1.0),
        ("#### -5", "5", 0.0),
        ("#### 42.", "42", 1.0),
        ("#### 42 apples", "42", 1.0),
        ("#### 0.50", "0.5", 1.0),
        ("#### .5", "0.5", 1.0),
        ("####42", "42", 1.0),
        ("#### 41\nno, wait\n#### 42", "42", 1.0),
        ("#### 42\nno, wait\n#### 41", "42", 0.0),
        ("The answer is 42", "42", 0.0),
        ("#### 420", "42", 0.0),
        ("#### 4 2", "42", 0.0),
        ("#### 42.5", "42", 0.0),
        ("#### 42/2", "42", 0.0),
        ("#### 42,5", "42", 0.0),
        ("#### forty-two", "42", 0.0),
        ("####", "42", 0.0),
        ("", "42", 0.0),
        ("#### nan", "42", 0.0),
        ("<think>#### 42</think>I do not know", "42", 1.0),
        ("<think>#### 42</think>#### 41", "42", 0.0),
        ("<think>#### 41</think>#### 42", "42", 1.0),
        ("#### 42", "She has 6 * 7 = <<6*7=42>>42 apples.\n#### 42", 1.0),
        ("#### 42", 42, 1.0),
    ],
)
def test_strict_uses_the_number_after_the_last_marker(answer, truth, expected):
    assert compute_score(answer, truth) == expected


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("So she pays 42 dollars.", "42", 1.0),
        ("It costs $1,234.50.", "1234.5", 1.0),
        ("6 * 7 = 42", "42", 1.0),
        ("between 40-42", "42", 1.0),
        ("x = -42", "-42", 1.0),
        ("42, not 41", "42", 0.0),
        ("version v42", "42", 0.0),
        ("no number", "42", 0.0),
        ("#### 42", "42", 1.0),
    ],
)
def test_flexible_uses_the_last_number(answer, truth, expected):
    assert compute_score(answer, truth, method="flexible") == expected


def test_format_score_is_the_score_of_a_wrong_number_in_the_correct_format():
    assert compute_score("#### 41", "42", format_score=0.1) == 0.1
    assert compute_score("41", "42", format_score=0.1) == 0.0


def test_keywords_reach_the_scorer_of_the_data_source():
    assert default_compute_score("openai/gsm8k", "42", "42", None, method="flexible") == 1.0
    assert default_compute_score("openai/gsm8k", "42", "42", None) == 0.0


def test_errors_name_an_invalid_ground_truth_and_method():
    with pytest.raises(ValueError, match="ground_truth='many' is not a number"):
        compute_score("#### 42", "many")
    with pytest.raises(ValueError, match=r"method=loose.*strict or flexible"):
        compute_score("#### 42", "42", method="loose")


def test_long_response_is_scored():
    assert compute_score("1," * 500_000 + "#### 42", "42") == 1.0
    assert compute_score("1" * 1_000_000, "42", method="flexible") == 0.0
