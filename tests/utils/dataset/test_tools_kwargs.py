"""`extra_info.tools_kwargs`: dicts, JSON text, and the errors of other forms."""

import json

import pytest

from verl.utils.dataset.tools_kwargs import read_tools_kwargs

GIVEN = {"search": {"create_kwargs": {"k": 1}, "execute_kwargs": {"timeout": 2}}}


@pytest.mark.parametrize("value", [GIVEN, json.dumps(GIVEN), GIVEN | {"calculator": None}])
def test_dicts_and_json_text_are_equal(value):
    assert read_tools_kwargs({"tools_kwargs": value, "need_tools_kwargs": True}) == GIVEN


@pytest.mark.parametrize("info", [{}, {"tools_kwargs": None}, {"tools_kwargs": ""}, {"tools_kwargs": "null"}])
def test_a_row_may_have_none(info):
    assert read_tools_kwargs(info) == {}
    with pytest.raises(ValueError, match=r"need_tools_kwargs is True but extra_info\.tools_kwargs is empty"):
        read_tools_kwargs(info | {"need_tools_kwargs": True})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("{search", "tools_kwargs is text but not JSON"),
        ("[1]", "tools_kwargs is a list"),
        ([GIVEN], "tools_kwargs is a list"),
        ({"search": 3}, r"tools_kwargs\.search is a int"),
        ({"search": {"create_kwargs": "x"}}, r"tools_kwargs\.search\.create_kwargs is a str"),
        ({"search": {"execute_kwargs": {"agent_data": 1}}}, "sets agent_data, which verl passes itself"),
    ],
)
def test_other_forms_are_errors(value, words):
    with pytest.raises(ValueError, match=words):
        read_tools_kwargs({"tools_kwargs": value})
