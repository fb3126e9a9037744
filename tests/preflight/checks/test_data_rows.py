import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fixtures.script import Script, row
from verl.config import load_config
from verl.preflight.checks.data_rows import MAX_ROWS, SAMPLE_SIZE, check_rows
from verl.preflight.findings import Findings


@pytest.fixture
def check(tmp_path):
    """Return a function that returns the findings in training rows, and the lengths of their prompts."""
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
    ("columns", "words"),
    [
        ({"prompt": "text"}, "'prompt' is a plain string"),
        ({"prompt": [{"content": "x"}]}, r"prompt\[0\] has no role"),
        ({"data_source": "mine"}, "data_source=mine has no built-in scorer"),
        ({"data_source": None}, "data_source=unknown has no built-in scorer"),
        ({"reward_model": {"style": "rule"}}, "reward_model.ground_truth' is missing"),
        ({"reward_model": "4"}, "'reward_model' is a str"),
        ({"agent_name": "tool_agnt"}, "'agent_name': tool_agnt is unknown .did you mean tool_agent.*or give the file"),
        ({"agent_name": 5}, "'agent_name' is a int; it must be the name"),
        ({"images": ["a.png"]}, "has images, which are not supported"),
    ],
)
def test_the_first_invalid_row_is_an_error(check, tmp_path, columns, words):
    path = tmp_path / "rows.jsonl"
    rows = [row()] * 9 + [row(**columns)] + [row()] * 5 + [row(prompt=None)]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    found, lengths = check(None, data__train_files=path)
    assert lengths is None
    (error,) = found.errors
    assert error.startswith(f"data.train_files: {path}, row 9 (counted from 0): ")
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(error)


def test_a_custom_reward_function_may_use_any_columns(check):
    rows = [row(data_source="mine", reward_model=None)] * 8
    found, lengths = check(rows, reward__custom_reward_function__path=check.script.reward)
    assert found.errors == [] and lengths.measured == 8


def test_rows_may_name_loops_that_are_known_or_may_become_known(check, tmp_path):
    rows = [row(agent_name=name) for name in ("tool_agent", "single_turn_agent")] + [row(agent_name=None)]
    assert check(rows)[0].errors == []
    rows = [row(agent_name="mine")]
    loop, file = "actor_rollout_ref__rollout__agent__default_agent_loop", tmp_path / "loops.yaml"
    assert check(rows, **{loop: "mine"})[0].errors == []
    assert check(rows, actor_rollout_ref__rollout__agent__agent_loop_config_path=file)[0].errors == []
    assert check(rows, actor_rollout_ref__rollout__multi_turn__function_tool_path=file)[0].errors == []
    (error,) = check(rows)[0].errors
    assert "agent_loop_config_path" in error


def test_validation_rows_are_checked(check, tmp_path):
    path = tmp_path / "val.jsonl"
    path.write_text(json.dumps(row()) + "\n" + json.dumps(row(data_source="mine")) + "\n")
    found, _ = check([row()] * 4, data__val_files=path)
    assert len(found.errors) == 1 and found.errors[0].startswith(f"data.val_files: {path}, row 1 ")


def test_rows_after_max_rows_are_not_checked(check):
    rows = [row()] * MAX_ROWS + [row(data_source="mine")]
    assert check(rows)[0].errors == []
    assert len(check(rows[1:])[0].errors) == 1


def test_a_sample_contains_the_first_and_the_last_prompt(check):
    """A prompt of n words has n + 3 tokens."""
    found, lengths = check([row(words=20)] + [row(words=10)] * 5000 + [row(words=30)])
    assert (lengths.measured, lengths.median, lengths.longest, lengths.over) == (SAMPLE_SIZE, 13, 33, 0)
    assert found.errors == found.warnings == []


@pytest.mark.parametrize(
    ("keys", "kind", "words"),
    [
        ({}, "errors", "row 3 (counted from 0), with 103 tokens; raise it to 103"),
        ({"data__truncation": "left"}, "warnings", "data.truncation=left truncates them"),
        (
            {"data__filter_overlong_prompts": True},
            "warnings",
            "data.filter_overlong_prompts=True drops them; raise it to 103",
        ),
        ({"data__max_prompt_length": 5, "data__filter_overlong_prompts": True}, "errors", "would drop all prompts"),
    ],
)
def test_overlong_prompts_are_reported(check, keys, kind, words):
    found, lengths = check([row()] * 3 + [row(words=100)], **keys)
    assert lengths.over == (4 if "data__max_prompt_length" in keys else 1)
    (text,) = getattr(found, kind)
    assert words in text and f"{lengths.over} of 4 prompts" in text
    assert not (found.errors and found.warnings)


def test_unknown_text_is_a_warning(check):
    """Every second prompt has 2 unknown tokens of 7."""
    strange = row(prompt=[{"role": "user", "content": "word Wort mot word"}])
    found, _ = check([row(), strange] * 8)
    (text,) = found.warnings
    assert (
        text.startswith("data.train_files: the tokenizer in")
        and "does not know 14% of the tokens in 16 prompts" in text
    )
    assert check([row()] * 60 + [strange])[0].warnings == []


def test_prompts_are_not_measured_without_a_tokenizer(check):
    (check.script.model / "tokenizer.json").unlink()
    found, lengths = check([row()] * 4)
    assert lengths is None and found.errors == [] and "not measured" in found.notes[0]


def test_a_further_column_that_cannot_be_read_is_an_error(check, tmp_path):
    path = tmp_path / "rows.parquet"
    table = pa.Table.from_pylist([row()] * 3)
    pq.write_table(table.append_column("made", pa.array([1, 2, 3], pa.timestamp("us", "Mars/Phobos"))), path)
    (error,) = check(None, data__train_files=path)[0].errors
    assert f"{path}, row 0" in error and "column 'made'" in error
