"""Parsing of tool calls: valid, missing and malformed calls."""

import json

import pytest

from verl.agent_loop.tool_parser import PARSERS, opens_reasoning, parse_hermes
from verl.config import names


def call(text):
    return f"<tool_call>{text}</tool_call>"


def test_calls_between_text_are_returned_in_order():
    text = "I add.\n" + call('\n{"name": "a", "arguments": {"x": [1, {"y": "ü"}]}}\n') + " and " + call('{"name": "b"}')
    first, second = parse_hermes(text + " done")
    assert (first.name, first.arguments, first.problem) == ("a", {"x": [1, {"y": "ü"}]}, None)
    assert (second.name, second.arguments, second.problem) == ("b", {}, None)


def test_arguments_as_json_text_are_parsed():
    (found,) = parse_hermes(call(json.dumps({"name": "a", "arguments": '{"x": 1}'})))
    assert found.arguments == {"x": 1} and found.problem is None


@pytest.mark.parametrize(
    "text", ["", "no call", "<tool_call>", '<tool_call>{"name": "a"}', '{"name": "a"}</tool_call>']
)
def test_text_without_a_complete_call_gives_no_call(text):
    assert parse_hermes(text) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not valid JSON"),
        ("", "is not valid JSON"),
        ('{"name": "a", "arguments": "{"}', "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("3", "has no name"),
        ("{}", "has no name"),
        ('{"name": 3}', "has no name"),
        ('{"name": "a", "arguments": [1]}', "a list"),
        ('{"name": "a", "arguments": null}', "a NoneType"),
    ],
)
def test_a_malformed_call_has_its_problem(text, words):
    (found,) = parse_hermes(call(text))
    assert words in found.problem and found.name == ""


A, B = call('{"name": "a"}'), call('{"name": "b"}')


@pytest.mark.parametrize(
    ("text", "in_reasoning", "expected"),
    [
        (f"<think>{A}</think>{B}", False, "b"),
        (f"<think>{A}</think>{B}<think>{A}</think>{B}", False, "bb"),
        (f"{A}<think>{B}</think>", False, "a"),
        (f"<think>I could {A}", False, ""),
        (f"<think></think>{A}", False, "a"),
        (f"{A}</think>{B}", False, "b"),
        (f"{A}</think>{B}", True, "b"),
        (A, True, ""),
        (f"<tool_call>unfinished</think>{B}", True, "b"),
        (f"<tool_call>unfinished</think>{B}", False, "b"),
        (f"<think><tool_call></think>{B}", False, "b"),
        (call('{"name": "a", "arguments": {"text": "<think> </think>"}}') + B, False, "ab"),
    ],
)
def test_calls_in_the_reasoning_are_not_returned(text, in_reasoning, expected):
    assert "".join(found.name for found in parse_hermes(text, in_reasoning)) == expected


def test_many_unfinished_calls_are_read_in_linear_time():
    assert [found.name for found in parse_hermes("<tool_call>" * 50_000 + B)] == ["b"]


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|Assistant|><think>", True),
        ("<|im_start|>assistant\n", False),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
    ],
)
def test_a_template_may_open_the_reasoning(prompt, opened):
    assert opens_reasoning(prompt) is opened


def test_the_formats_match_the_config():
    assert set(PARSERS) == set(names.TOOL_FORMATS)
