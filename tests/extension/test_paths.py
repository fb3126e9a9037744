import os

import pytest

from verl.extension.paths import expand_user, path_problem


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("~nosuchuser/a", "there is no user nosuchuser; write the directory"),
        ("a\0b", "null character"),
        ("/tmp/" + "ä" * 128, "a name of 256 bytes; a name has at most 255"),
        ("/" + "ab/" * 1400, "a path of 4200 bytes; a path has at most 4095"),
    ],
)
def test_a_path_that_no_file_can_have_has_a_problem(path, words):
    assert words in path_problem(path)


@pytest.mark.parametrize("path", ["~", "~/a", "a", "/tmp/" + "a" * 255, "/" + "a/" * 2047])
def test_a_path_that_a_file_can_have_has_none(path):
    assert path_problem(path) is None


def test_the_limits_are_those_of_the_operating_system(tmp_path):
    assert not os.path.exists(tmp_path / ("a" * 255))
    with pytest.raises(OSError, match="too long"):
        os.stat(tmp_path / ("a" * 256))


def test_an_unknown_user_is_left_in_the_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert [str(expand_user(path)) for path in ("~/a", "~nosuchuser/a")] == ["/home/me/a", "~nosuchuser/a"]
