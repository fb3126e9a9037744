"""reasoning-gym tasks: our score is the task's own score for its own items."""

import json

import pytest

from verl.utils.reward_score import default_compute_score, prepare
from verl.utils.reward_score.reasoning_gym_score import entry_of, extract_answer

reasoning_gym = pytest.importorskip("reasoning_gym")


def test_spell_backward_agrees_with_its_dataset():
    dataset = reasoning_gym.create_dataset("spell_backward", seed=3, size=20)
    for item in dataset:
        truth = item["answer"]
        for answer in (truth, truth[:-1], "z" + truth[1:], truth.upper(), "", truth + truth):
            score = default_compute_score("reasoning_gym/spell_backward", answer, truth, {"entry": item})
            assert score == pytest.approx(float(dataset.score_answer(answer, item)))
        assert default_compute_score("reasoning_gym/spell_backward", truth, truth, {"index": 0}) == 1.0


def test_a_task_whose_scorer_reads_the_metadata():
    dataset = reasoning_gym.create_dataset("countdown", seed=3, size=3)
    for item in dataset:
        truth = item["answer"]
        as_json = {"entry": json.dumps(item)}
        parts = {"question": item["question"], "metadata": json.dumps(item["metadata"])}
        for info in ({"entry": item}, as_json, parts):
            assert default_compute_score("reasoning_gym/countdown", f"<answer>{truth}</answer>", truth, info) == 1.0
            assert default_compute_score("reasoning_gym/countdown", "1 + 1", truth, info) < 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" tac ", "tac"),
        ("<answer> tac </answer>", "tac"),
        ("<answer>a</answer> no <answer>b</answer>", "b"),
        ("<think><answer>a</answer></think> b", "b"),
        ("<answer>a", "<answer>a"),
        ("", ""),
    ],
)
def test_extract_answer(text, expected):
    assert extract_answer(text) == expected


def test_wrong_task_and_wrong_entry_are_named():
    with pytest.raises(ValueError, match=r"no task 'spell_sideways'.*spell_backward"):
        default_compute_score("reasoning_gym/spell_sideways", "a", "a", {})
    with pytest.raises(ValueError, match="no task"):
        prepare("reasoning_gym/spell_sideways")
    with pytest.raises(ValueError, match=r"extra_info.entry is text that is not JSON"):
        entry_of("a", {"entry": "{"})
    with pytest.raises(ValueError, match=r"extra_info.metadata is of type list"):
        entry_of("a", {"metadata": [1]})
