"""Damage to files: cut off, emptied, replaced, with changed bits, and with wrong values in JSON and safetensors."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from campaign.cases import Damage

Change = Callable[[bytes, random.Random], bytes]


def of_bytes(name: str, change: Change) -> Damage:
    """Return a damage that replaces the bytes of a file; the file is a new one, so that links to it stay whole."""

    def damage(root: Path, chance: random.Random) -> None:
        path = root / name
        content = change(path.read_bytes(), chance)
        path.unlink()
        path.write_bytes(content)

    return damage


def _flip(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.randint(1, 8)):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _insert(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + chance.randbytes(chance.randint(1, 16)) + content[place:]


BYTES: dict[str, Change] = {
    "empty": lambda content, chance: b"",
    "cut": lambda content, chance: content[: chance.randrange(1, len(content))],
    "one-byte-short": lambda content, chance: content[:-1],
    "zeros": lambda content, chance: bytes(len(content)),
    "noise": lambda content, chance: chance.randbytes(len(content)),
    "bits": _flip,
    "inserted": _insert,
    "doubled": lambda content, chance: content * 2,
    "utf16": lambda content, chance: b"\xff\xfe" + content.decode("latin-1").encode("utf-16-le"),
    "html": lambda content, chance: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "pointer": lambda content, chance: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n",
}
"""Changes of any file: those of disks and of transfers, and what a server sends instead of a file."""
UNREADABLE = ("empty", "zeros", "noise", "html", "pointer")
"""Changes after which no format can be read."""


def remove(name: str) -> Damage:
    """Return a damage that removes a file or directory."""

    def damage(root: Path, chance: random.Random) -> None:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def replace_by_directory(name: str) -> Damage:
    """Return a damage that puts a directory instead of a file."""

    def damage(root: Path, chance: random.Random) -> None:
        (root / name).unlink()
        (root / name).mkdir()

    return damage


def replace_by_link(name: str, target: str) -> Damage:
    """Return a damage that puts a symbolic link instead of a file."""

    def damage(root: Path, chance: random.Random) -> None:
        (root / name).unlink()
        os.symlink(target, root / name)

    return damage


PLACES: dict[str, Callable[[str], Damage]] = {
    "missing": remove,
    "directory": replace_by_directory,
    "broken-link": lambda name: replace_by_link(name, "no-such-file"),
    "link-to-itself": lambda name: replace_by_link(name, Path(name).name),
}
"""Changes of the file's place in its directory."""

JSON_TEXTS = {
    "list": "[]",
    "text": '"text"',
    "null": "null",
    "number": "17",
    "deep": "[" * 200_000,
    "deep-object": '{"a":' * 200_000,
    "digits": '{"a": ' + "9" * 5000 + "}",
    "surrogate": '{"a": "\\ud800"}',
    "empty-object": "{}",
}
"""Whole texts of a JSON file."""

JSON_VALUES: dict[str, Any] = {
    "null": None,
    "text": "kumquat",
    "empty-text": "",
    "negative": -3,
    "zero": 0,
    "fractional": 0.5,
    "huge": 10**18,
    "digits": 10**400,
    "nan": float("nan"),
    "infinite": float("inf"),
    "true": True,
    "list": [1, "a", None],
    "empty-list": [],
    "object": {"kumquat": 1},
    "empty-object": {},
}
"""Values of a field."""


def text(name: str, content: str) -> Damage:
    """Return a damage that replaces the text of a file."""
    return of_bytes(name, lambda old, chance: content.encode())


def json_field(name: str, field: str, value: Any) -> Damage:
    """Return a damage that sets a field of a JSON object."""
    return of_bytes(name, lambda old, chance: json.dumps({**json.loads(old), field: value}).encode())


def without_json_field(name: str, field: str) -> Damage:
    """Return a damage that removes a field of a JSON object."""

    def change(old: bytes, chance: random.Random) -> bytes:
        return json.dumps({key: value for key, value in json.loads(old).items() if key != field}).encode()

    return of_bytes(name, change)


def safetensors_header(name: str, change: Callable[[dict[str, Any], random.Random], Any]) -> Damage:
    """Return a damage of the header of a safetensors file; `change` takes the header and returns it, changed."""

    def replaced(old: bytes, chance: random.Random) -> bytes:
        length = struct.unpack("<Q", old[:8])[0]
        raw = json.dumps(change(json.loads(old[8 : 8 + length]), chance)).encode()
        return struct.pack("<Q", len(raw)) + raw + old[8 + length :]

    return of_bytes(name, replaced)


def _entry(**values: Any) -> Callable[[dict[str, Any], random.Random], Any]:
    """Return a change of the entry of one tensor."""

    def change(header: dict[str, Any], chance: random.Random) -> Any:
        tensor = chance.choice([key for key in header if key != "__metadata__"])
        header[tensor] = {**header[tensor], **values}
        return header

    return change


def _without_entry(header: dict[str, Any], chance: random.Random) -> Any:
    header.pop(chance.choice([key for key in header if key != "__metadata__"]))
    return header


HEADERS: dict[str, Callable[[dict[str, Any], random.Random], Any]] = {
    "not-an-object": lambda header, chance: [header],
    "entry-is-null": lambda header, chance: header | {"extra": None},
    "unknown-dtype": _entry(dtype="F77"),
    "dtype-is-number": _entry(dtype=32),
    "negative-shape": _entry(shape=[-1, -64]),
    "fractional-shape": _entry(shape=[0.5, 128]),
    "text-shape": _entry(shape=["64", "64"]),
    "huge-shape": _entry(shape=[2**62, 2**62]),
    "no-shape": _entry(shape=None),
    "nested-shape": _entry(shape=[[64], [64]]),
    "true-shape": _entry(shape=[True, True]),
    "offsets-beyond-end": _entry(data_offsets=[0, 2**60]),
    "negative-offsets": _entry(data_offsets=[-8, 8]),
    "swapped-offsets": _entry(data_offsets=[64, 0]),
    "one-offset": _entry(data_offsets=[0]),
    "text-offsets": _entry(data_offsets=["0", "8"]),
    "overlapping": _entry(data_offsets=[0, 4], shape=[1], dtype="F32"),
    "without-a-tensor": _without_entry,
    "other-metadata": lambda header, chance: header | {"__metadata__": 7},
}
LENGTHS = {"zero": 0, "one": 1, "beyond-end": 2**40, "largest": 2**64 - 1}
"""Lengths of a safetensors header."""


def safetensors_length(name: str, length: int) -> Damage:
    """Return a damage that replaces the length of the header."""
    return of_bytes(name, lambda old, chance: struct.pack("<Q", length) + old[8:])
