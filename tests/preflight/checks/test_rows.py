"""Rows of data files, read before a run: the first fault by its row, and the lengths of prompts."""

import json

import pytest

from fixtures.script import Script, row
from verl.config import load_config
from verl.preflight.checks.rows import MOST_ROWS, SAMPLE, check_rows
from verl.preflight.findings import Findings


@pytest.fixture
def of(tmp_path):
    """What is found in these training rows, and the lengths."""
    script = Script(tmp_path)

    def run(rows, **keys):
        if rows is not None:
            script.rows(rows)
        given = script.keys | {name.replace("__", "."): value for name, value in keys.items()}
        found = Findings()
        return found, check_rows(load_config([f"{name}={value}" for name, value in given.items()]), found)

    run.script = script
    return run


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"prompt": "text"}, "'prompt' is a plain string"),
        ({"prompt": [{"content": "x"}]}, r"prompt\[0\] has no role"),
        ({"data_source": "mine"}, "data_source=mine has no built-in scorer"),
        ({"data_source": None}, "data_source=unknown has no built-in scorer"),
        ({"reward_model": {"style": "rule"}}, "reward_model.ground_truth' is missing"),
        ({"reward_model": "4"}, "'reward_model' is a str"),
        ({"images": ["a.png"]}, "has images, which are not supported yet"),
    ],
)
def test_the_first_fault_is_named_by_its_row(of, tmp_path, fault, words):
    path = tmp_path / "rows.jsonl"
    rows = [row()] * 9 + [row(**fault)] + [row()] * 5 + [row(prompt=None)]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    found, lengths = of(None, data__train_files=path)
    assert lengths is None
    (error,) = found.errors
    assert error.startswith(f"data.train_files: {path}, row 9 (counted from 0): ")
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(error)


def test_a_reward_function_of_ones_own_may_read_anything(of):
    rows = [row(data_source="mine", reward_model=None)] * 8
    found, lengths = of(rows, reward__custom_reward_function__path=of.script.reward)
    assert found.errors == [] and lengths.measured == 8


def test_validation_rows_are_read_too(of, tmp_path):
    path = tmp_path / "val.jsonl"
    path.write_text(json.dumps(row()) + "\n" + json.dumps(row(data_source="mine")) + "\n")
    found, _ = of([row()] * 4, data__val_files=path)
    assert len(found.errors) == 1 and found.errors[0].startswith(f"data.val_files: {path}, row 1 ")


def test_rows_behind_the_first_many_are_left_to_the_run(of):
    rows = [row()] * MOST_ROWS + [row(data_source="mine")]
    assert of(rows)[0].errors == []
    assert len(of(rows[1:])[0].errors) == 1


def test_a_sample_has_both_ends(of):
    """A prompt of n words has n + 3 tokens."""
    found, lengths = of([row(words=20)] + [row(words=10)] * 5000 + [row(words=30)])
    assert (lengths.measured, lengths.median, lengths.longest, lengths.over) == (SAMPLE, 13, 33, 0)
    assert found.errors == found.warnings == []


@pytest.mark.parametrize(
    ("keys", "kind", "words"),
    [
        ({}, "errors", "row 3 (counted from 0), with 103: the run would end there; raise it to 103"),
        ({"data__truncation": "left"}, "warnings", "which are cut (data.truncation=left)"),
        ({"data__filter_overlong_prompts": True}, "warnings", "which are dropped; raise it to 103"),
        ({"data__max_prompt_length": 5, "data__filter_overlong_prompts": True}, "errors", "nothing would be left"),
    ],
)
def test_prompts_that_are_too_long(of, keys, kind, words):
    found, lengths = of([row()] * 3 + [row(words=100)], **keys)
    assert lengths.over == (4 if "data__max_prompt_length" in keys else 1)
    (text,) = getattr(found, kind)
    assert words in text and f"{lengths.over} of 4 prompts" in text
    assert not (found.errors and found.warnings)


def test_text_that_the_tokenizer_does_not_know(of):
    """Two words of seven in each second prompt."""
    strange = row(prompt=[{"role": "user", "content": "word Wort mot word"}])
    found, _ = of([row(), strange] * 8)
    (text,) = found.warnings
    assert text.startswith("data.train_files: 14% of the tokens of 16 prompts are text that the tokenizer in")
    assert of([row()] * 60 + [strange])[0].warnings == []


def test_without_tokenizer_nothing_is_measured(of):
    (of.script.model / "tokenizer.json").unlink()
    found, lengths = of([row()] * 4)
    assert lengths is None and found.errors == [] and "not measured" in found.notes[0]
