"""Parsing of tool calls: valid, missing and malformed calls."""

import json

import pytest

from verl.agent_loop.tool_parser import PARSERS, parse_hermes
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


def test_the_formats_match_the_config():
    assert set(PARSERS) == set(names.TOOL_FORMATS)
