"""Files that are whole or absent."""

import errno
import os

import pytest

from verl.utils.atomic_io import atomic_write_text, fsync_path


def test_write_replaces_the_content_and_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "tracker.txt"
    atomic_write_text(path, "1")
    atomic_write_text(path, "zwei \u2603")
    assert path.read_text(encoding="utf-8") == "zwei \u2603"
    assert os.listdir(tmp_path) == ["tracker.txt"]


def test_a_failed_write_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "tracker.txt"
    atomic_write_text(path, "old")

    def full_disk(fd):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        atomic_write_text(path, "x" * 10_000)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["tracker.txt"]


def test_half_a_character_is_written_as_u_fffd(tmp_path):
    atomic_write_text(tmp_path / "a", "a\ud83d")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "a\ufffd"


def test_fsync_accepts_files_and_directories(tmp_path):
    (tmp_path / "a").write_text("a")
    fsync_path(tmp_path / "a")
    fsync_path(tmp_path)
    with pytest.raises(FileNotFoundError):
        fsync_path(tmp_path / "b")
