"""Manifests and checksums of checkpoints."""

import json
import zlib

import pytest

from verl.utils import checkpoint_files
from verl.utils.checkpoint_files import MANIFEST, find_damage, later_checkpoints, write_manifest, write_manifest_part


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A checkpoint whose large file has three chunks, the last one shorter."""
    monkeypatch.setattr(checkpoint_files, "CHUNK_BYTES", 1000)
    (tmp_path / "actor").mkdir()
    (tmp_path / "actor" / "large").write_bytes(bytes(range(250)) * 10)
    (tmp_path / "empty").write_bytes(b"")
    write_manifest(tmp_path)
    return tmp_path


def test_the_manifest_has_sizes_and_a_checksum_per_chunk(checkpoint):
    data = bytes(range(250)) * 10
    assert json.loads((checkpoint / MANIFEST).read_text()) == {
        "chunk_bytes": 1000,
        "files": {
            "actor/large": {"bytes": 2500, "crc32": [zlib.crc32(data[i : i + 1000]) for i in (0, 1000, 2000)]},
            "empty": {"bytes": 0, "crc32": []},
        },
    }
    assert find_damage(checkpoint) is None
    write_manifest(checkpoint)
    assert find_damage(checkpoint) is None, "a second manifest does not list the first"


def test_ranks_share_the_checksums(checkpoint, monkeypatch):
    for name in ("model/__0_0.distcp", "model/__1_0.distcp", "model/__11_0.distcp", "rng_rank_1.pt", "config.yaml"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text(name * 300)
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint)
    expected = (checkpoint / MANIFEST).read_text()
    (checkpoint / MANIFEST).unlink()

    read = []
    chunk_checksum = checkpoint_files._chunk_checksum
    monkeypatch.setattr(
        checkpoint_files, "_chunk_checksum", lambda path, start: read.append(path.name) or chunk_checksum(path, start)
    )
    (checkpoint / "config.yaml").rename(checkpoint / "later")
    write_manifest_part(checkpoint, 1, 2)
    assert set(read) == {"__1_0.distcp", "__11_0.distcp", "rng_rank_1.pt"}
    read.clear()
    write_manifest_part(checkpoint, 0, 2)
    assert set(read) == {"__0_0.distcp", "large", "later"}
    (checkpoint / "later").rename(checkpoint / "config.yaml")
    for rank, new in ((1, set()), (0, {"config.yaml"})):
        read.clear()
        write_manifest_part(checkpoint, rank, 2)
        assert set(read) == new, "a second call reads the new files"
    read.clear()
    write_manifest(checkpoint)
    assert read == [] and (checkpoint / MANIFEST).read_text() == expected
    assert not list(checkpoint.glob("manifest.*_*"))


def test_a_file_of_another_size_is_read_again(checkpoint):
    write_manifest_part(checkpoint, 0, 1)
    (checkpoint / "empty").write_text("text")
    write_manifest(checkpoint)
    assert find_damage(checkpoint) is None
    assert json.loads((checkpoint / MANIFEST).read_text())["files"]["empty"]["bytes"] == 4


@pytest.mark.parametrize(("position", "chunk"), [(0, "0 to 1000"), (999, "0 to 1000"), (2499, "2000 to 2500")])
def test_the_damaged_bytes_are_named(checkpoint, position, chunk):
    file = checkpoint / "actor" / "large"
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)
    assert find_damage(checkpoint) == f"{file} is damaged: its bytes {chunk} do not match their checksum"
    assert find_damage(checkpoint, contents=False) is None


def test_later_checkpoints_are_those_with_the_right_sizes(tmp_path):
    for step in (2, 4, 10, 12):
        (tmp_path / f"global_step_{step}").mkdir()
        (tmp_path / f"global_step_{step}" / "file").write_text("text")
        write_manifest(tmp_path / f"global_step_{step}")
    (tmp_path / "global_step_10" / "file").unlink()
    (tmp_path / "global_step_14.tmp-5").mkdir()
    assert [path.name for path in later_checkpoints(tmp_path, 2)] == ["global_step_4", "global_step_12"]
    assert later_checkpoints(tmp_path, 12) == [] and later_checkpoints(tmp_path / "none", 0) == []


def test_an_unreadable_file_is_damage(checkpoint, monkeypatch):
    def fail(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint_files.os, "pread", fail)
    assert find_damage(checkpoint) == f"{checkpoint / 'actor' / 'large'} cannot be read (Input/output error)"


def test_a_manifest_with_sizes_only_is_compared_by_size(checkpoint):
    (checkpoint / MANIFEST).write_text(json.dumps({"actor/large": 2500, "empty": 0}))
    assert find_damage(checkpoint) is None
    (checkpoint / MANIFEST).write_text(json.dumps({"actor/large": 2501}))
    assert find_damage(checkpoint) == f"{checkpoint / 'actor' / 'large'} has 2500 bytes instead of 2501"


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", "{", '{"chunk_bytes": 1000, "files": [1]}', '{"a": "1"}']
    + [f'{{"chunk_bytes": 1000, "files": {{"empty": {entry}}}}}' for entry in ("3", "{}", '{"bytes":0,"crc32":[1]}')],
)
def test_an_invalid_manifest_is_damage(checkpoint, text):
    (checkpoint / MANIFEST).write_text(text)
    assert find_damage(checkpoint) == f"{checkpoint / MANIFEST} is damaged"


def test_a_strange_manifest_is_damage(checkpoint):
    manifest = checkpoint / MANIFEST
    for text in ("[" * 100_000, '{"a":' * 3000, "\ufeff{}", json.dumps({"\0": 1}), json.dumps({"x" * 5000: 1})):
        manifest.write_text(text, encoding="utf-8")
        assert find_damage(checkpoint).endswith(("is damaged", "is missing"))
    manifest.write_bytes(b"\xff")
    assert find_damage(checkpoint) == f"{manifest} is damaged"
    manifest.unlink()
    manifest.mkdir()
    assert find_damage(checkpoint) == f"{manifest} cannot be read (Is a directory)"


def test_a_checkpoint_of_another_program_has_no_manifest(tmp_path):
    assert find_damage(tmp_path) is None
    assert find_damage(tmp_path / "missing") == f"{tmp_path / 'missing'} is not a directory"
