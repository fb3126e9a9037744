"""Fingerprints of small and of large files."""

import hashlib

import pytest

from verl.utils import fingerprint
from verl.utils.fingerprint import fingerprints


def change(path, position):
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 1]))


def test_a_small_file_is_hashed_whole(tmp_path):
    path = tmp_path / "small"
    path.write_bytes(bytes(range(256)) * 40_000)
    [before] = fingerprints([path])
    expected = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    assert before == {"bytes": 10_240_000, "blake2b": expected, "sampled": False}
    for position in (0, 5_000_001, 10_239_999):
        change(path, position)
        [now] = fingerprints([path])
        assert now != before
        change(path, position)
    assert fingerprints([path]) == [before]


def test_a_large_file_is_sampled_from_its_first_to_its_last_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "FULL_BYTES", 100_000)
    monkeypatch.setattr(fingerprint, "_BLOCK_BYTES", 100)
    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * 4_000)
    [before] = fingerprints([path])
    assert before["sampled"] and before["bytes"] == 1_024_000
    for position in (0, 99, 1_023_900, 1_023_999):
        change(path, position)
        assert fingerprints([path]) != [before], position
        change(path, position)
    change(path, 120)  # between two blocks
    assert fingerprints([path]) == [before]
    with path.open("ab") as file:
        file.write(b"x")
    assert fingerprints([path]) != [before]


@pytest.mark.parametrize("name", ["missing", "folder"])
def test_a_file_that_cannot_be_read_has_no_fingerprint(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    assert fingerprints([tmp_path / name, tmp_path / "empty"])[0] is None
    assert fingerprints([tmp_path / "empty"])[0]["bytes"] == 0
