"""Which architectures train, with which quantized rollouts: `make models` writes the table of docs/models.md.

For each architecture a tiny model with random weights is trained by GRPO for two steps, once for each quantization,
with the command line that users have. A run passes if

- `trainer.check_consistency` finds engine and trainer equal, before the first step and after the first update,
- it ends without an error, with finite losses,
- its exported model has the files, names, shapes and dtypes of the source, and other weights.

Otherwise the cell shows whether it was refused before the start, or stopped later.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import runs
import tables
from architectures import ARCHITECTURES, VOCABULARY, write_architecture
from ray.cluster_utils import Cluster
from safetensors import safe_open

QUANTIZATIONS = (None, "fp8", "ascend")
LOAD = runs.Load(prompts=4, n=4, shortest=4, longest=12, updates=1, micro_batch=8, prompt=32)


@dataclass(frozen=True)
class Outcome:
    """Result of one run.

    Attributes:
        passed: everything in the module's docstring holds.
        text: content of the cell.
        reason: reason of a run that did not pass.
        packed: sequences were packed without padding; None if the run did not train.
    """

    passed: bool
    text: str
    reason: str = ""
    packed: bool | None = None


def run(name: str, quantization: str | None, root: Path, timeout: float) -> Outcome:
    """Train the model of an architecture and evaluate the result."""
    directory = root / f"{name}-{quantization}"
    dtype = "bfloat16" if quantization == "fp8" else ARCHITECTURES[name].dtype
    keys = runs.keys(
        LOAD,
        root / name,
        directory,
        steps=2,
        overrides={
            # For some models, transformers replaces the tokenizer of the directory by the usual one of the model.
            "actor_rollout_ref.model.tokenizer_path": root / "tokenizer",
            "actor_rollout_ref.rollout.quantization": quantization or "null",
            "actor_rollout_ref.actor.optim.lr": 1e-3,
            "actor_rollout_ref.actor.checkpoint.save_contents": "[model,hf_model]",
            "trainer.save_freq": 2,
            "trainer.logger": "[file,console]",
            **({"actor_rollout_ref.rollout.dtype": dtype} if dtype else {}),
        },
    )
    process = runs.start(keys)
    try:
        status = process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
        return Outcome(False, "hangs", f"no end after {timeout:g} s")
    log = runs.log_of(keys).read_text()
    if status:
        started = "starting 1 trainer rank" in log
        return Outcome(False, "stops" if started else "refused", _reason(log).replace(f"{root}/", ""))
    steps = runs.metrics(keys)
    if not all(math.isfinite(step["actor/pg_loss"]) and step["actor/grad_norm"] > 0 for step in steps):
        return Outcome(False, "wrong", "a loss is not finite, or a gradient is 0")
    difference = _export_difference(root / name, directory / "global_step_2" / "actor" / "huggingface")
    if difference:
        return Outcome(False, "wrong", f"the exported model {difference}")
    return Outcome(True, "yes", packed=steps[-1]["actor/perf/padding_fraction"] == 0)


def _reason(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for number, line in enumerate(lines):
        if line.startswith("verl: the run failed:"):
            return line.removeprefix("verl: the run failed:").strip()
        if line.startswith("verl: the config cannot work:"):
            # With several problems, each has a line of its own below this one.
            first, following = line.removeprefix("verl: the config cannot work:").strip(), lines[number + 1 :]
            return following[0].removeprefix("- ") if following and following[0].startswith("- ") else first
    return lines[-1] if lines else "no output"


def _export_difference(source: Path, export: Path) -> str:
    """Return how an exported model differs from its source in anything but values; empty if it does not."""
    before, after = _tensors(source), _tensors(export)
    if before.keys() != after.keys():
        return f"lacks {sorted(before.keys() - after.keys())[:3]}, has {sorted(after.keys() - before.keys())[:3]} too"
    for name, (tensor, other) in {name: (before[name], after[name]) for name in before}.items():
        if (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
            return f"has {name} as {other.dtype} {list(other.shape)}"
    if all(before[name].equal(after[name]) for name in before):
        return "has the weights of its source"
    configs = [json.loads((directory / "config.json").read_text()) for directory in (source, export)]
    if configs[0]["architectures"] != configs[1]["architectures"]:
        return f"has architectures={configs[1]['architectures']}"
    return ""


def _tensors(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    return found


def text_of(outcomes: dict[tuple[str, str | None], Outcome]) -> str:
    """Return the table, and the reasons below it, numbered."""
    reasons: dict[str, int] = {}
    rows = []
    for name in dict.fromkeys(name for name, _ in outcomes):
        cells = []
        for quantization in QUANTIZATIONS:
            outcome = outcomes[name, quantization]
            mark = "" if outcome.passed else f" [{reasons.setdefault(outcome.reason, len(reasons) + 1)}]"
            cells.append(outcome.text + mark)
        packed = {outcomes[name, q].packed for q in QUANTIZATIONS} - {None}
        rows.append(
            [f"`{name}`", ARCHITECTURES[name].example, *cells, "yes" if packed == {True} else "no" if packed else ""]
        )
    head = ["architecture", "for example", "bf16 or float32", "`fp8`", "`ascend`", "packs"]
    notes = "\n".join(f"{number}. {reason}" for reason, number in reasons.items())
    return f"{tables.caption('make models')}\n\n{tables.markdown(head, rows)}\n\n{notes}"


def outcomes_of(text: str) -> dict[tuple[str, str | None], Outcome]:
    """Return the outcomes that a document contains: the reverse of `text_of`."""
    section = text.partition("<!-- models -->")[2].partition("<!-- /models -->")[0]
    reasons = dict(re.findall(r"^(\d+)\. (.+)$", section, re.MULTILINE))
    found = {}
    for line in section.splitlines():
        if not line.startswith("| `"):
            continue
        name, _, *cells, packs = (cell.strip() for cell in line.strip("|").split("|"))
        for quantization, cell in zip(QUANTIZATIONS, cells, strict=True):
            word, _, mark = cell.partition(" ")
            packed = {"yes": True, "no": False}.get(packs) if not mark else None
            found[name.strip("`"), quantization] = Outcome(not mark, word, reasons.get(mark.strip("[]"), ""), packed)
    return found


def rows_of(text: str) -> set[str]:
    """Return the rows of the table in a document, without the numbers of the reasons and without alignment."""
    rows = (line for line in text.splitlines() if line.startswith("| `"))
    return {re.sub(r" \[\d+\]|\s+", " ", row) for row in rows}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="ARCHITECTURE", help="default: all")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--timeout", type=float, default=300, help="of a run, in seconds")
    parser.add_argument("--check", action="store_true", help="fail if a cell differs from the document's")
    tables.add_write_option(parser)
    arguments = parser.parse_args()
    names = arguments.names or list(ARCHITECTURES)
    # Runs that join a cluster save its start. Ray starts as many processes at a time as it has CPUs.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4 * arguments.jobs, "include_dashboard": False})
    os.environ["RAY_ADDRESS"] = cluster.address
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(arguments.jobs) as pool:
        root = Path(temporary)
        models.write_tokenizer(VOCABULARY, root / "tokenizer")
        for name in names:
            write_architecture(name, root / name)
        cases = [(name, quantization) for name in names for quantization in QUANTIZATIONS]

        def one(case: tuple[str, str | None]) -> Outcome:
            outcome = run(*case, root, arguments.timeout)
            print(f"{case[0]:12} {case[1] or '-':7} {outcome.text}  {outcome.reason}", file=sys.stderr, flush=True)
            return outcome

        outcomes = dict(zip(cases, pool.map(one, cases), strict=True))
    cluster.shutdown()
    if arguments.write and not arguments.check:
        # Rows that were not measured stay as they are.
        merged = outcomes_of(arguments.write.read_text(encoding="utf-8")) | outcomes
        outcomes = {(name, q): merged[name, q] for name in ARCHITECTURES for q in QUANTIZATIONS if (name, q) in merged}
    text = text_of(outcomes)
    print(text)
    if arguments.check:
        written = rows_of(arguments.write.read_text(encoding="utf-8"))
        known = {row.split("|")[1] for row in written}
        differing = {row for row in rows_of(text) - written if row.split("|")[1] in known}
        if differing:
            raise SystemExit("rows that differ from the document:\n" + "\n".join(sorted(differing)))
    elif arguments.write:
        tables.write_section(arguments.write, "models", text)


if __name__ == "__main__":
    main()
