"""Content checks of a tool's response."""

import pytest

from verl.tools import ToolResponse


@pytest.mark.parametrize(
    ("response", "empty", "text_only"),
    [
        ({}, True, False),
        ({"text": ""}, True, False),
        ({"text": "a"}, False, True),
        ({"image": [1]}, False, False),
        ({"text": "a", "image": [1]}, False, False),
        ({"text": "a", "video": [1]}, False, False),
        ({"text": "a", "image": [], "video": []}, False, True),
    ],
)
def test_a_response_reports_its_content(response, empty, text_only):
    made = ToolResponse(**response)
    assert (made.is_empty(), made.is_text_only()) == (empty, text_only)
