"""The calculator example: its files, its demonstrations, and a calculator that is safe for any input."""

import asyncio
import json
import random
import time
from pathlib import Path

import pyarrow.parquet
import pytest

from fixtures.chat import ScriptedClient
from verl.agent_loop.tool_agent_loop import ToolAgentLoop
from verl.config import PPOConfig
from verl.utils.tokenizer import hf_tokenizer

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tool_agent"
SMALL = dict(train_rows=40, test_rows=12, warm_steps=1, warm_batch=4)


@pytest.fixture(scope="module")
def script(load_example):
    return load_example("tool_agent/prepare.py")


@pytest.fixture(scope="module")
def calculator(load_example):
    return load_example("tool_agent/calculator.py")


@pytest.fixture(scope="module")
def reward(load_example):
    return load_example("tool_agent/reward.py")


@pytest.fixture(scope="module")
def prepared(script, tmp_path_factory):
    directory = tmp_path_factory.mktemp("prepared")
    assert script.prepare(directory, script.Settings(**SMALL)) is True
    return directory


def test_prepared_files_are_reused_only_for_the_same_settings(script, prepared):
    assert script.prepare(prepared, script.Settings(**SMALL)) is False
    assert not script.is_prepared(prepared, script.Settings(**SMALL, calls=0.9))
    assert not script.is_prepared(prepared / "model", script.Settings(**SMALL))


def test_rows_are_different_sums_and_no_test_row_is_a_training_row(prepared):
    sums = []
    for split, count in (("train", 40), ("test", 12)):
        rows = pyarrow.parquet.read_table(prepared / f"{split}.parquet").to_pylist()
        assert len(rows) == count
        for index, row in enumerate(rows):
            text = row["prompt"][0]["content"]
            a, b = map(int, text.split("+"))
            assert 100 <= a <= 499 and 100 <= b <= 499
            assert row["reward_model"]["ground_truth"] == str(a + b)
            assert row["extra_info"] == {"index": index, "split": split}
            sums.append(text)
    assert len(set(sums)) == 52


def test_demonstrations_equal_the_output_of_the_agent_loop(script, prepared):
    """The warm start trains on the same tokens as a rollout, with the same loss mask."""
    tokenizer = hf_tokenizer(prepared / "model")
    pieces = script.demonstration((123, 456), 1.0, random.Random(0))
    own = [tokenizer.encode(text, add_special_tokens=False) for text, learnt in pieces if learnt]
    config = PPOConfig()
    config.actor_rollout_ref.rollout.multi_turn.tool_config_path = str(EXAMPLE / "tool_config.yaml")
    client = ScriptedClient(own)
    loop = ToolAgentLoop(client, tokenizer, config, **ToolAgentLoop.setup(tokenizer, config))
    output = asyncio.run(loop.run({}, raw_prompt=[{"role": "user", "content": "123+456"}]))
    assert tokenizer.decode(output.prompt_ids) == "[calculator]<s>123+456="
    expected = [
        (token, learnt) for text, learnt in pieces for token in tokenizer.encode(text, add_special_tokens=False)
    ]
    assert list(zip(output.response_ids, map(bool, output.response_mask), strict=True)) == expected
    assert output.extra_fields["tool_failures"] == {} and output.stop_reason == "stop"
    text = tokenizer.decode(output.response_ids, skip_special_tokens=True)
    assert text.endswith("</tool_call><tool_response>579</tool_response>=579")


def test_every_sample_fits_the_length_limits_of_the_run(script, prepared):
    tokenizer = hf_tokenizer(prepared / "model")
    pieces = script.demonstration((499, 499), 1.0, random.Random(0))
    assert sum(len(tokenizer.encode(text, add_special_tokens=False)) for text, _ in pieces) <= 48


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("579", 1.0),
        ("578", 0.0),
        ("", 0.0),
        ("<tool_call>...</tool_call><tool_response>579</tool_response>=579", 1.0),
        ("<tool_call>...</tool_call><tool_response>579</tool_response>=57", 0.0),
        # The result is in the response of the tool, not in the text of the model.
        ("<tool_call>...</tool_call><tool_response>579</tool_response>=", 0.0),
        ("<tool_call>...</tool_call><tool_response>579</tool_response>=<tool_call>...</tool_call>", 0.0),
    ],
)
def test_only_the_last_answer_of_the_model_counts(reward, text, score):
    found = reward.compute_score("sums", text, "579", {"tool_call_counts": text.count("<tool_call>")})
    assert found == {"score": score, "acc": score, "used_tool": float("<tool_call>" in text)}


@pytest.mark.parametrize(
    ("expression", "shown"),
    [
        ("123+456", "579"),
        (" (3 + 4) * -5 ", "-35"),
        ("7/2", "3.5"),
        ("6/3", "2"),
        ("7//2 - 7%4 + 2**10", "1024"),
        ("2**-1", "0.5"),
        ("0.1+0.2", "0.30000000000000004"),
        ("2**500", str(2**500)),
        ("1e300", "1e+300"),
        ("-" * 50 + "1", "1"),
    ],
)
def test_arithmetic_expressions_are_evaluated(calculator, expression, shown):
    assert calculator.shown(calculator.evaluate(expression)) == shown


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "1+",
        "one",
        "__import__('os').system('true')",
        "(1).__class__",
        "[1][0]",
        "'a'*9",
        "True+1",
        "1j",
        "1 if 1 else 2",
        "1<2",
        "(x:=1)",
        "lambda: 1",
        "f'{1}'",
        "1;2",
        "9**9**9",
        "2**513",
        "2**512*2",
        "(-8)**0.5",
        "1e308*10",
        "10.0**400",
        "1/0",
        "5%0",
        "1e999",
        "1+" * 200 + "1",
        "(" * 150 + "1" + ")" * 150,
        "(" * 99 + "1",
        "\0",
        "1\n2",
    ],
)
def test_invalid_or_excessive_expressions_are_rejected_quickly(calculator, expression):
    started = time.process_time()
    with pytest.raises(ValueError):
        calculator.evaluate(expression)
    assert time.process_time() - started < 5


def test_the_demonstrations_match_the_schema_of_the_tool(calculator, script):
    tool = calculator.CalculatorTool({}, None)
    call = json.loads(script.CALL_BEGIN + "1+2" + script.CALL_END)
    assert call["name"] == tool.name and set(call["arguments"]) == set(tool.tool_schema.function.parameters.properties)
    response, reward, _ = tool.execute("", call["arguments"])
    assert response.text == "3" and reward is None
