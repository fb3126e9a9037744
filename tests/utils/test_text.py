"""Lone surrogates (half a character, which UTF-8 cannot encode) and control characters."""

import json

import pytest

from verl.utils.text import valid_text, valid_value, without_controls, without_repeated_keys


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("", ""),
        ("a\x00é中\U0001f600", "a\x00é中\U0001f600"),
        ("\ud83d", "\ufffd"),
        ("a\ude00b", "a\ufffdb"),
        ("\ud83d\ude00", "\U0001f600"),  # the two halves of one character
        ("\ude00\ud83d", "\ufffd\ufffd"),
        ("\ud83d\ud83d\ude00x\udcff", "\ufffd\U0001f600x\ufffd"),
        ("\ufeff\ud83d", "\ufeff\ufffd"),
    ],
)
def test_text_can_be_encoded_afterwards(text, valid):
    assert valid_text(text) == valid and valid_text(valid) == valid
    valid.encode()


def test_texts_and_keys_inside_of_values():
    value = {"\ud83d": ["\udc80", 1, None, {"a": ("b\ud83d", 2.5)}]}
    assert valid_value(value) == {"\ufffd": ["\ufffd", 1, None, {"a": ["b\ufffd", 2.5]}]}


def test_control_characters_become_symbols():
    assert without_controls("a\x1b[31m\x00\n\t\r\x7f\x9b\ud83d é中") == "a␛[31m␀\n\t␍␡\ufffd\ufffd é中"


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '[{"b": {"a": 1, "c": 0, "a": 1}}]'])
def test_a_key_that_stands_twice_is_an_error(text):
    with pytest.raises(ValueError, match="the key 'a' stands twice in one object"):
        json.loads(text, object_pairs_hook=without_repeated_keys)


def test_other_objects_are_as_json_reads_them():
    text = '{"a": {"a": [{"a": 1}, {}]}, "b": null}'
    assert json.loads(text, object_pairs_hook=without_repeated_keys) == json.loads(text)
