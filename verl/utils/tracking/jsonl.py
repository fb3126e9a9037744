"""The `file` backend: metrics as JSON lines, one per step, also after kills and resumes."""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from verl.utils.atomic_io import atomic_write_text
from verl.utils.plain_data import parse_json
from verl.utils.tracking.plain import to_json

logger = logging.getLogger(__name__)

METRICS_FILE, GENERATIONS_FILE = "metrics.jsonl", "generations.jsonl"
# No run has more steps; a larger number is damage.
MAX_STEP = 10**12


def read_steps(path: str | Path) -> list[dict[str, Any]]:
    """Read the records of a JSONL file in order; skip an incomplete or damaged line with a warning.

    Returns:
        records `{"step": int, ...}` of plain values (`verl.utils.plain_data`); empty if the file does not exist.
    """
    path = Path(path)
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and type(record.get("step")) is int and 0 <= record["step"] <= MAX_STEP:
            records.append(record)
        else:
            logger.warning("%s: line %d is damaged (killed while writing it?) and is skipped", path, number)
    return records


class StepFile:
    """A JSONL file with at most one record per step, in the order of steps.

    Opening it removes an incomplete last line. The records after `resume_step`, which the resumed run writes again, are
    appended to PATH.dropped: after a resume from an earlier checkpoint they are all that is left of the other branch.
    A fresh run (`resume_step=None`) moves an existing file to PATH.previous.

    Each record is one write, flushed to the operating system, so SIGKILL loses no written record.
    """

    def __init__(self, path: str | Path, resume_step: int | None):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step is None:
            kept = []
            if self.path.exists() and self.path.stat().st_size:
                previous = self.path.with_name(self.path.name + ".previous")
                os.replace(self.path, previous)
                logger.info("%s belonged to an earlier run and is now %s", self.path, previous)
        else:
            records = read_steps(self.path)
            kept = _one_a_step(record for record in records if record["step"] <= resume_step)
            self._set_aside([record for record in records if record["step"] > resume_step])
        self._last = kept[-1] if kept else None
        text = "".join(to_json(record) + "\n" for record in kept)
        if not self.path.exists() or self.path.read_bytes() != text.encode():
            atomic_write_text(self.path, text)
        self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115  (closed by close)
        self._end = self._file.seek(0, os.SEEK_END)
        self._last_start = self._end - len((to_json(self._last) + "\n").encode()) if self._last else self._end

    def _set_aside(self, dropped: Sequence[Mapping[str, Any]]) -> None:
        if dropped:
            file = self.path.with_name(self.path.name + ".dropped")
            with open(file, "a", encoding="utf-8") as out:
                out.write("".join(to_json(record) + "\n" for record in dropped))
            logger.info("%s: %d records after the step to resume from are now in %s", self.path, len(dropped), file)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record; merge it into the last line if it has the same step.

        Raises:
            ValueError: its step is before the last one.
            OSError: for example a full disk; names the file.
        """
        step, last = record["step"], self._last
        start = self._end
        if last is not None and step < last["step"]:
            raise ValueError(f"step={step}: {self.path} already holds step {last['step']}; steps must not decrease")
        if last is not None and step == last["step"]:
            start, record = self._last_start, _merged(last, record)
        line = (to_json(record) + "\n").encode()
        try:
            written = os.pwrite(self._file.fileno(), line, start)
            while written < len(line):
                written += os.pwrite(self._file.fileno(), line[written:], start + written)
            self._file.truncate(start + len(line))
        except OSError as error:
            text = f"{error.strerror}; the record of step {step} is not written"
            raise OSError(error.errno, text, str(self.path)) from error
        self._last, self._last_start, self._end = record, start, start + len(line)

    def close(self) -> None:
        """Flush to the disk and close. Writing afterwards is an error."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()


def _one_a_step(records: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    by_step: dict[int, Mapping[str, Any]] = {}
    for record in records:
        by_step[record["step"]] = _merged(by_step.get(record["step"], {}), record)
    return [by_step[step] for step in sorted(by_step)]


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    both = {**old, **new}
    for name in old.keys() & new.keys():
        if isinstance(old[name], dict) and isinstance(new[name], dict):
            both[name] = {**old[name], **new[name]}
    return both


class FileBackend:
    """Writes `{"step": int, "data": {name: number}}` per line, and sampled generations to `generations.jsonl`."""

    def __init__(self, path: str | Path, resume_step: int | None = None):
        self._metrics = StepFile(path, resume_step)
        self._generations_path = self._metrics.path.with_name(GENERATIONS_FILE)
        self._resume_step = resume_step
        # A resumed run removes the generations of lost steps even if it never logs one itself.
        self._generations = StepFile(self._generations_path, resume_step) if self._generations_path.exists() else None

    def log(self, data: Mapping[str, Any], step: int) -> None:
        self._metrics.write({"step": step, "data": dict(data)})

    def log_generations(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        if self._generations is None:
            self._generations = StepFile(self._generations_path, self._resume_step)
        self._generations.write({"step": step, "generations": list(rows)})

    def finish(self) -> None:
        for file in (self._metrics, self._generations):
            if file is not None:
                file.close()
