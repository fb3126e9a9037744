"""Boxes in a text, and the scorer under upstream verl's name; expected values are written out by hand."""

import pytest

from verl.utils.reward_score import math_reward
from verl.utils.reward_score.math_reward import last_boxed_only_string, remove_boxed


@pytest.mark.parametrize(
    ("text", "box", "content"),
    [
        (r"The answer is \boxed{5}.", r"\boxed{5}", "5"),
        (r"\boxed{1}, or rather \boxed{2}", r"\boxed{2}", "2"),
        (r"$\boxed{\frac{a}{b}}$ and more }", r"\boxed{\frac{a}{b}}", r"\frac{a}{b}"),
        (r"\boxed{\{1, 2\}}", r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\}}", r"\boxed{\}}", r"\}"),
        (r"\boxed{}", r"\boxed{}", ""),
        (r"\boxed{a" + "\n" + "b}", "\\boxed{a\nb}", "a\nb"),
        (r"\boxed{\boxed{3}}", r"\boxed{3}", "3"),
    ],
)
def test_the_last_box_and_its_content(text, box, content):
    assert last_boxed_only_string(text) == box
    assert remove_boxed(box) == content


@pytest.mark.parametrize("text", ["", "5", r"\boxed{5", r"\boxed{\frac{1}{2}", r"\boxed{1} \boxed{2", "boxed{5}"])
def test_a_text_without_a_closed_last_box_has_none(text):
    assert last_boxed_only_string(text) is None


@pytest.mark.parametrize("box", [r"\fbox{7}", r"\boxed 7", r"\boxed {7}"])
def test_other_forms_of_a_box_have_the_same_content(box):
    assert remove_boxed(last_boxed_only_string(f"so ${box}$")) == "7"


@pytest.mark.parametrize(
    ("box", "content"),
    [(r"\boxed{a \boxed{b}}", r"a \boxed{b}"), (r"\boxed{\text{a} b}", r"\text{a} b"), (r"\boxed 5", "5")],
)
def test_the_content_is_all_of_the_box_that_begins_the_text(box, content):
    assert remove_boxed(box) == content


@pytest.mark.parametrize(
    "text", ["", "5", r"x\boxed{5}", r"\boxed{5", r"\boxed{1} and \boxed{2}", r"\boxed", r"\boxed5", r"\fbox{5}", "{5}"]
)
def test_a_text_that_is_no_box_is_an_error(text):
    with pytest.raises(ValueError, match=r"remove_boxed: .* call last_boxed_only_string before"):
        remove_boxed(text)


@pytest.mark.parametrize(
    ("response", "truth", "score"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac12", 1.0),
        (r"\boxed{3}", "4", 0.0),
        ("3", "3", 0.0),
        (r"\boxed{4} no, \boxed{3}", "3", 1.0),
    ],
)
def test_the_score_is_one_or_zero_and_needs_a_box(response, truth, score):
    result = math_reward.compute_score(response, truth)
    assert result == score and type(result) is float
