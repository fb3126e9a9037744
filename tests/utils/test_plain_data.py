"""JSON and YAML become plain, bounded values, or a ValueError."""

import json
import math

import pytest

from verl.utils.plain_data import MAX_DEPTH, parse_json, parse_yaml


def nested(levels):
    return "[" * levels + "]" * levels


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1, 2.5, null, true, "x"]}', {"a": [1, 2.5, None, True, "x"]}),
        ("9" * 19, 10**19 - 1),
        ("9" * 20, 1e20),
        ("-" + "9" * 5000, -math.inf),
        ("1e999", math.inf),
        (r'"\ud800"', "\ufffd"),
    ],
)
def test_json_becomes_plain(text, value):
    assert parse_json(text) == value
    assert type(parse_json(text)) is type(value)


@pytest.mark.parametrize("text", [b"\xff", b"{", b"", nested(100_000), nested(MAX_DEPTH + 1), '{"a":' * 5000])
def test_json_that_cannot_be_used_is_an_error(text):
    with pytest.raises(ValueError):
        parse_json(text)


def test_the_deepest_value_can_be_written():
    value = parse_json(nested(MAX_DEPTH))
    assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: [1, x]\nb: null", {"a": [1, "x"], "b": None}),
        ("a: 2026-13-45", {"a": "2026-13-45"}),
        ("2026-01-01: 1:30", {"2026-01-01": 90}),
        ("a: 0x" + "f" * 5000, {"a": math.inf}),
        ("a: " + "9" * 5000, {"a": math.inf}),
        ("{2: a, null: b, true: c}", {"2": "a", "None": "b", "True": "c"}),
        ("a: !!set {x}", {"a": ["x"]}),
        ("a: !!binary aGk=", {"a": "b'hi'"}),
    ],
)
def test_yaml_becomes_plain(text, value):
    assert parse_yaml(text) == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &me [*me]", "alias"),
        ("a: &b 1\nc: *b", "alias"),
        ("<<: &a {b: 1}\nc: *a", "alias"),
        ("!!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("a: !!bool maybe", "maybe"),
        ("a: !!timestamp x\nb: !!float y", "y"),
        ("? [a]\n: b", "unhashable"),
        ("- " * 3000 + "x", "nested deeper"),
        ("a: [1,\nb: {", "line 2"),
        ("\x01", "not allowed"),
    ],
)
def test_yaml_that_cannot_be_used_is_an_error_in_one_line(text, says):
    with pytest.raises(ValueError, match=says) as error:
        parse_yaml(text)
    assert "\n" not in str(error.value)
