"""Directories and copies of local paths; hdfs:// paths with and without the command."""

import stat
from pathlib import Path

import pytest

from verl.utils import hdfs_io
from verl.utils.fs import copy_to_local


def test_local_paths(tmp_path):
    hdfs_io.makedirs(tmp_path / "a/b")
    with pytest.raises(FileExistsError):
        hdfs_io.makedirs(tmp_path / "a/b")
    hdfs_io.makedirs(tmp_path / "a/b", exist_ok=True)
    (tmp_path / "a/b/x.txt").write_text("x")
    assert (
        hdfs_io.copy(str(tmp_path / "a/b/x.txt"), str(tmp_path / "y.txt")) and (tmp_path / "y.txt").read_text() == "x"
    )
    assert hdfs_io.copy(tmp_path / "a", tmp_path / "c") and (tmp_path / "c/b/x.txt").is_file()
    assert hdfs_io.exists(tmp_path / "c") and not hdfs_io.exists(tmp_path / "absent")
    assert copy_to_local(str(tmp_path / "y.txt")) == str(tmp_path / "y.txt")
    with pytest.raises(ValueError, match="keywords retries are not supported"):
        hdfs_io.makedirs(tmp_path / "d", retries=3)


@pytest.mark.parametrize(
    "call", [hdfs_io.makedirs, hdfs_io.exists, copy_to_local, lambda path: hdfs_io.copy(path, "x")]
)
def test_remote_paths_without_a_command_are_errors(tmp_path, monkeypatch, call):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ValueError, match="hdfs://host/x: the command hdfs is not installed here"):
        call("hdfs://host/x")
    with pytest.raises(ValueError, match="s3://bucket/x: only local paths and hdfs:// are supported"):
        call("s3://bucket/x")


def test_remote_paths_use_the_command(tmp_path, monkeypatch):
    """The command of this test keeps hdfs://host/NAME as tmp_path/store/NAME."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "store").mkdir()
    command = tmp_path / "bin/hdfs"
    command.write_text(
        f"""#!/bin/bash
local() {{ echo "${{1/hdfs:\\/\\/host/{str(tmp_path / "store").replace("/", chr(92) + "/")}}}"; }}
case $2 in
  -test) [ -e "$(local "$4")" ] ;;
  -mkdir) mkdir -p "$(local "$4")" ;;
  -put | -get | -cp) cp -r "$(local "$4")" "$(local "$5")" ;;
esac
"""
    )
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    (tmp_path / "x.txt").write_text("1")
    hdfs_io.makedirs("hdfs://host/d")
    assert hdfs_io.exists("hdfs://host/d") and (tmp_path / "store/d").is_dir()
    hdfs_io.copy(tmp_path / "x.txt", "hdfs://host/d/x.txt")
    copied = copy_to_local("hdfs://host/d/x.txt", cache_dir=tmp_path / "cache")
    assert Path(copied).read_text() == "1" and copied.endswith("/x.txt")
    (tmp_path / "store/d/x.txt").write_text("2")
    assert Path(copy_to_local("hdfs://host/d/x.txt", cache_dir=tmp_path / "cache")).read_text() == "1"
    assert (
        Path(copy_to_local("hdfs://host/d/x.txt", cache_dir=tmp_path / "cache", always_recopy=True)).read_text() == "2"
    )
    with pytest.raises(OSError, match="failed with the exit status"):
        hdfs_io.copy("hdfs://host/absent", tmp_path / "y")
