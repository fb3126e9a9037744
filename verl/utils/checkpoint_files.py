"""Published checkpoints of a run: names, manifest, checksums. Imports no torch.

`verl.trainer.ppo.checkpoint` describes the directories and writes them. The manifest of a checkpoint contains the size
of each file in bytes and one CRC-32 per chunk of 64 MiB, so that threads share the work of a large file. CRC-32 detects
every error burst of up to 32 bits, and misses other damage of a chunk with a probability of 2^-32. zlib's CRC-32 is
nearly three times as fast as BLAKE2b; docs/checkpoints.md has its rate.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

from verl.utils.atomic_io import fsync_path
from verl.utils.host import cpu_cores
from verl.utils.plain_data import parse_json

TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
DRIVER_STATE = "data.pt"
ENGINE_STATE = "engine.json"
CHUNK_BYTES = 64 << 20
_READ_BYTES = 4 << 20
_MAX_THREADS = 16
_MAX_DIGITS = 18
# Files of one rank: shards of torch.distributed.checkpoint, and random number generators.
_OF_RANK = re.compile(r"(?:__|rng_rank_)(\d+)(?:_\d+\.distcp|\.pt)")
_PART = re.compile(r"manifest\.rank_\d+\.json")
_PUBLISHED = re.compile(r"global_step_(\d+)")


class _Entry(TypedDict):
    """A file in the manifest: size, and CRC-32 of each chunk."""

    bytes: int
    crc32: list[int]


def step_of(path: str | Path) -> int:
    """Return the step of a `global_step_N` directory.

    Raises:
        ValueError: the directory has another name.
    """
    match = _PUBLISHED.fullmatch(Path(path).name)
    if match is None:
        raise ValueError(f"{path}: not a checkpoint; use a directory named global_step_N")
    return int(match[1])


def list_checkpoints(root: Path) -> list[Path]:
    """Return the published checkpoints of a run, complete or damaged, in order of their steps."""
    if not os.path.isdir(root):  # False for names that are too long, where pathlib raises
        return []
    found = [path for path in root.iterdir() if _PUBLISHED.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def tracked_checkpoint(root: Path) -> tuple[Path | None, str | None]:
    """Return the directory that the tracker file names, and the problem if the file contains no step.

    The directory may not exist. Both are None without a tracker file.
    """
    tracker = root / TRACKER
    try:
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None, None
    except OSError as error:
        return None, f"{tracker} cannot be read ({error.strerror})"
    if not text:
        return None, f"{tracker} is empty"
    # More digits than this are no step; Python converts at most 4300.
    if not text.isascii() or not text.isdigit() or len(text) > _MAX_DIGITS:
        return None, f"{tracker} contains {text[:80]!r} instead of a step"
    return root / f"global_step_{int(text)}", None


def resume_candidates(root: Path) -> tuple[list[Path], str | None]:
    """Return the checkpoints to resume from, the first one first, and the problem if the tracker file names none.

    These are the checkpoint that the tracker file names and those before it: later ones belong to another branch. If it
    names no existing checkpoint, all are candidates.
    """
    named, problem = tracked_checkpoint(root)
    found = list_checkpoints(root)
    if named is not None and named in found:
        found = found[: found.index(named) + 1]
    elif found and problem is None:
        missing = "does not exist" if named is None else f"names step {step_of(named)}, but {named} does not exist"
        problem = f"{root / TRACKER} {missing}"
    return found[::-1], problem


def later_checkpoints(root: Path, step: int) -> list[Path]:
    """Return the checkpoints of a run after a step, in order of their steps, without those whose sizes are wrong."""
    later = [path for path in list_checkpoints(root) if step_of(path) > step]
    return [path for path in later if find_damage(path, contents=False) is None]


def write_manifest_part(directory: Path, rank: int, ranks: int) -> None:
    """Flush the files of one rank to the disk, and store their checksums for `write_manifest`.

    So the ranks share the work, and on several nodes each reads what its own node wrote. Every rank may call it several
    times; a call adds the files that are new. The files must be complete.

    Args:
        directory: the directory of the checkpoint.
        rank, ranks: this rank, and the number of ranks.

    Raises:
        OSError: a file cannot be read or flushed.
    """
    part = directory / f"manifest.rank_{rank}.json"
    entries: dict[str, _Entry] = json.loads(part.read_text(encoding="utf-8")) if part.exists() else {}
    files = [file for file in _files_below(directory) if _owner(file.name, ranks) == rank]
    new = [file for file in files if file.relative_to(directory).as_posix() not in entries]
    for file in new:
        fsync_path(file)
    part.write_text(json.dumps(entries | _entries(directory, new)), encoding="utf-8")


def write_manifest(directory: Path) -> None:
    """Write the manifest of every other file below `directory`; the files must be complete.

    Checksums that `write_manifest_part` stored are used, and its files removed.
    """
    parts = sorted(path for path in directory.iterdir() if _PART.fullmatch(path.name))
    known: dict[str, _Entry] = {}
    for part in parts:
        known |= json.loads(part.read_text(encoding="utf-8"))
    files = {file.relative_to(directory).as_posix(): file for file in _files_below(directory)}
    known = {
        name: entry for name, entry in known.items() if name in files and files[name].stat().st_size == entry["bytes"]
    }
    entries = known | _entries(directory, [file for name, file in files.items() if name not in known])
    text = json.dumps({"chunk_bytes": CHUNK_BYTES, "files": dict(sorted(entries.items()))}, indent=1)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")
    for part in parts:
        part.unlink()


def _files_below(directory: Path) -> list[Path]:
    """Return the files of a checkpoint, without its manifest and the parts of one."""
    return sorted(
        path
        for path in directory.rglob("*")
        if path.is_file() and path != directory / MANIFEST and not _PART.fullmatch(path.name)
    )


def _owner(name: str, ranks: int) -> int:
    """Return the rank that wrote a file; rank 0 for files whose name does not tell it."""
    match = _OF_RANK.fullmatch(name)
    return 0 if match is None else int(match[1]) % ranks


def _entries(directory: Path, files: Sequence[Path]) -> dict[str, _Entry]:
    """Return the manifest's entry of each file by its relative path."""
    sizes = [file.stat().st_size for file in files]
    sums = _checksums(list(zip(files, sizes, strict=True)))
    return {
        file.relative_to(directory).as_posix(): {"bytes": size, "crc32": checksum}
        for file, size, checksum in zip(files, sizes, sums, strict=True)
    }


def find_damage(checkpoint: Path, *, contents: bool = True) -> str | None:
    """Describe the first file that is missing or differs from the manifest; None if there is none.

    A checkpoint without a manifest, written by another program, counts as complete. The manifests of verl 0.1.0 contain
    only sizes, so the contents of these checkpoints are not compared.

    Args:
        contents: compare checksums too, which reads every file.
    """
    if not checkpoint.is_dir():
        return f"{checkpoint} is not a directory"
    manifest = checkpoint / MANIFEST
    try:
        entries = _read_manifest(manifest)
    except FileNotFoundError:
        return None
    except ValueError:
        return f"{manifest} is damaged"
    except OSError as error:
        return f"{manifest} cannot be read ({error.strerror})"
    for name, (size, _) in entries.items():
        file = checkpoint / name
        # Unlike Path's methods, os.path's also return False for names that no file can have.
        if not os.path.isfile(file):
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size} bytes instead of {size}"
    if not contents:
        return None
    summed = [(checkpoint / name, size, sums) for name, (size, sums) in entries.items() if sums is not None]
    try:
        found = _checksums([(file, size) for file, size, _ in summed])
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    for (file, size, expected), actual in zip(summed, found, strict=True):
        for number, (one, other) in enumerate(zip(expected, actual, strict=True)):
            if one != other:
                end = min(size, (number + 1) * CHUNK_BYTES)
                return f"{file} is damaged: its bytes {number * CHUNK_BYTES} to {end} do not match their checksum"
    return None


def _read_manifest(path: Path) -> Mapping[str, tuple[int, list[int] | None]]:
    """Return size and checksums by file name; the checksums are None in a manifest that contains only sizes.

    Raises:
        ValueError: the file is damaged.
        FileNotFoundError: there is no manifest.
    """
    content = parse_json(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not content:
        raise ValueError("not a manifest")
    if all(type(size) is int for size in content.values()):
        return {name: (size, None) for name, size in content.items()}
    files = content.get("files")
    if content.keys() != {"chunk_bytes", "files"} or content["chunk_bytes"] != CHUNK_BYTES:
        raise ValueError("unknown format")
    if not isinstance(files, dict) or not all(_is_entry(entry) for entry in files.values()):
        raise ValueError("invalid entry")
    return {name: (entry["bytes"], entry["crc32"]) for name, entry in files.items()}


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"bytes", "crc32"} or type(entry["bytes"]) is not int:
        return False
    return isinstance(entry["crc32"], list) and len(entry["crc32"]) == -(-entry["bytes"] // CHUNK_BYTES)


def _checksums(files: Sequence[tuple[Path, int]]) -> list[list[int]]:
    """Return the CRC-32 of each chunk of each file (path, bytes), computed by several threads."""
    chunks = [(path, start) for path, size in files for start in range(0, size, CHUNK_BYTES)]
    with ThreadPoolExecutor(min(_MAX_THREADS, cpu_cores())) as pool:
        sums = iter(list(pool.map(lambda chunk: _chunk_checksum(*chunk), chunks)))
    return [[next(sums) for _ in range(0, size, CHUNK_BYTES)] for _, size in files]


def _chunk_checksum(path: Path, start: int) -> int:
    checksum, position, end = 0, start, start + CHUNK_BYTES
    fd = os.open(path, os.O_RDONLY)
    try:
        while data := os.pread(fd, min(_READ_BYTES, end - position), position):
            checksum = zlib.crc32(data, checksum)
            position += len(data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(fd)
    return checksum
