import math

import pytest

from campaign.legality import why_illegal
from verl.config.schema import Key

NUMBER = Key(at_least=0, below=10)


@pytest.mark.parametrize(
    ("known", "hint", "value"),
    [
        (NUMBER, int, 3),
        (NUMBER, int, "3"),
        (NUMBER, int, 3.0),
        (NUMBER, float, "1e-6"),
        (NUMBER, int | None, None),
        (Key(), bool, "False"),
        (Key(), str, 7),
        (Key(), list[str], "a"),
        (Key(), list[int], [1, "2"]),
        (Key(choices=("on", "off")), str, True),
        (Key(choices=(1, 2)), int, "1"),
        (Key(), dict, {"a": math.nan}),
    ],
)
def test_a_legal_value(known, hint, value):
    assert why_illegal("a.b", known, hint, value, "") is None


@pytest.mark.parametrize(
    ("known", "hint", "value"),
    [
        (NUMBER, int, 3.5),
        (NUMBER, int, None),
        (NUMBER, int, True),
        (NUMBER, int, 10),
        (NUMBER, float, -0.5),
        (NUMBER, float, math.nan),
        (NUMBER, float, math.inf),
        (NUMBER, int, 2**31),
        (Key(), bool, 1),
        (Key(), str, ["a"]),
        (Key(), list[int], [1, "a"]),
        (Key(), list[float], [math.nan]),
        (Key(choices=("a", "b")), str, "c"),
        (Key(only=(None,)), str | None, "c"),
        (Key(path=True), str, "/no/such"),
    ],
)
def test_an_illegal_value(known, hint, value):
    assert why_illegal("a.b", known, hint, value, "") is not None


def test_a_value_without_effect_is_legal_if_the_output_says_so():
    assert why_illegal("a.b", Key(only=(None,)), str | None, "c", "note: no effect: a.b") is None
