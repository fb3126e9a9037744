"""The registry class behind the estimators and the losses."""

import pytest

from verl.algorithms.registry import Registry


def test_unsupported_name_is_an_error_that_lists_the_registered_names():
    registry = Registry("thing", "some.key", unsupported=("later",))
    registry.register("a")(len)
    with pytest.raises(ValueError, match=r"some.key='later' is not supported yet: use one of a"):
        registry.get("later")


def test_duplicate_name_is_an_error():
    registry = Registry("thing", "some.key")

    def one():
        return 1

    def two():
        return 2

    registry.register("a")(one)
    registry.register("a")(one)
    with pytest.raises(ValueError, match=r"thing 'a' is already registered by .*one"):
        registry.register("a")(two)
    assert registry.get("a") is one
    assert registry.names() == ["a"]
