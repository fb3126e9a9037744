"""reasoning-gym scorer: it returns the score of the task for its items."""

import json

import pytest

from verl.utils.reward_score import default_compute_score, prepare
from verl.utils.reward_score.reasoning_gym_score import entry_of, extract_answer

reasoning_gym = pytest.importorskip("reasoning_gym")


def test_spell_backward_has_the_score_of_its_dataset():
    dataset = reasoning_gym.create_dataset("spell_backward", seed=3, size=20)
    for item in dataset:
        truth = item["answer"]
        for answer in (truth, truth[:-1], "z" + truth[1:], truth.upper(), "", truth + truth):
            score = default_compute_score("reasoning_gym/spell_backward", answer, truth, {"entry": item})
            assert score == pytest.approx(float(dataset.score_answer(answer, item)))
        assert default_compute_score("reasoning_gym/spell_backward", truth, truth, {"index": 0}) == 1.0


def test_metadata_reaches_the_scorer_as_dict_or_json():
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
        ("<think><answer>a</answer></think>\n", "a"),
        ("<answer>a", "<answer>a"),
        ("", ""),
    ],
)
def test_extract_answer_returns_the_last_answer_tag(text, expected):
    assert extract_answer(text) == expected


def test_errors_name_an_unknown_task_and_an_invalid_entry():
    with pytest.raises(ValueError, match=r"unknown task 'spell_sideways'.*spell_backward"):
        default_compute_score("reasoning_gym/spell_sideways", "a", "a", {})
    with pytest.raises(ValueError, match="unknown task"):
        prepare("reasoning_gym/spell_sideways")
    with pytest.raises(ValueError, match=r"extra_info.entry is not valid JSON"):
        entry_of("a", {"entry": "{"})
    with pytest.raises(ValueError, match=r"extra_info.metadata is of type list"):
        entry_of("a", {"metadata": [1]})
