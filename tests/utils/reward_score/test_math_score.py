"""Math scorer: equal and unequal answers."""

import threading

import pytest

from verl.utils.reward_score import default_compute_score
from verl.utils.reward_score.math_score import compute_score
from verl.utils.reward_score.text import last_boxed


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5"),
        (r"\boxed{0.5}", r"\frac{1}{2}"),
        (r"\boxed{\dfrac12}", r"\frac{1}{2}"),
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}"),
        (r"\boxed{x^2+2x+1}", "(x+1)^2"),
        (r"\boxed{\{2, 1\}}", r"\{1, 2\}"),
        (r"\boxed{(1, 2)}", "(1,2)"),
        (r"\boxed{[0, \infty)}", r"[0,\infty)"),
        (r"\boxed{1,000}", "1000"),
        (r"\boxed{42}", 42),
        (r"\boxed {7}", "7"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),
        (r"<think>\boxed{2}</think> I do not know", "2"),
        (r"<think>\boxed{2}", "2"),
        (r"\boxed{5}", r"\boxed{5}"),
        (r"\boxed{5}", ["4", "5"]),
    ],
)
def test_equal_answers_score_1(answer, truth):
    assert compute_score(answer, truth) == 1.0


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        (r"\boxed{0.49}", r"\frac{1}{2}"),
        (r"\boxed{2} or rather \boxed{1}", "2"),
        (r"\boxed{2", "2a"),
        ("Answer: 2", "2"),
        ("We get $x = 2$.", "2"),
        (r"\boxed{(2, 1)}", "(1,2)"),
        (r"\boxed{-\sqrt{3}}", r"\sqrt{3}"),
        (r"\boxed{x+1}", "x-1"),
        (r"\boxed{}", "2"),
        (r"\boxed{\frac{}{}}", "2"),
        ("", "2"),
        (r"\boxed{4, 5}", ["4", "5"]),
    ],
)
def test_unequal_answers_score_0(answer, truth):
    assert compute_score(answer, truth) == 0.0


@pytest.mark.parametrize("source", ["lighteval/MATH", "DigitalLearningGmbH/MATH-lighteval", "HuggingFaceH4/MATH-500"])
def test_math_sources_score_0_or_1(source):
    assert default_compute_score(source, r"\boxed{\frac12}", "0.5") == 1.0
    assert default_compute_score(source, r"\boxed{\frac13}", "0.5") == 0.0


@pytest.mark.parametrize("source", ["math_dapo", "math", "math_dapo_reasoning", "aime2024", "aime_2025"])
def test_dapo_sources_score_1_or_minus_1(source):
    assert default_compute_score(source, "Answer: 42", "42") == {"score": 1.0, "acc": True, "pred": "42"}
    assert default_compute_score(source, "Answer: 41", "42") == {"score": -1.0, "acc": False, "pred": "41"}
    assert default_compute_score(source, "$42$", "42") == {"score": -1.0, "acc": False, "pred": "[INVALID]"}
    assert default_compute_score(source, r"**Answer:** $42$.", "42")["pred"] == "42"


@pytest.mark.parametrize("truth", ["", " ", r"\boxed{}", ["1", ""]])
def test_an_empty_ground_truth_is_an_error(truth):
    with pytest.raises(ValueError, match=r"ground_truth=.* has no answer"):
        compute_score(r"\boxed{1}", truth)


def test_scorer_works_outside_the_main_thread():
    scores = []
    thread = threading.Thread(target=lambda: scores.append(compute_score(r"\boxed{\frac12}", "0.5")))
    thread.start()
    thread.join()
    assert scores == [1.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{a{b}c} d", "a{b}c"),
        (r"\boxed{a} \boxed{b", None),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"\boxed 5$ and", "5"),
        (r"\fbox{5}", "5"),
        ("none", None),
    ],
)
def test_last_boxed_returns_the_content_of_the_last_box(text, expected):
    assert last_boxed(text) == expected
