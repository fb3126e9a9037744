"""Measure the output head of the policy in tiles (`model.use_fused_kernels`) against one that keeps the logits.

    python benchmarks/log_prob_head.py [--rows 16384] [--vocabulary 151936] [--hidden 1024] [--timed-rows 256]
        [--rounds 3] [--write DOCUMENT]

A pass computes log-probabilities and entropies from hidden states, and an update also their gradients. Memory is the
peak of all live tensors beyond those that exist before and after the pass. It is counted operation by operation on
tensors without storage, so it needs none. Times are those of fewer rows in float32; both heads take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
import weakref
from typing import Any

import machine
import tables
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from verl.utils.byte_size import format_bytes
from verl.workers.engine.head_log_probs import HeadTerm, head_log_probs
from verl.workers.engine.log_probs import token_log_probs

KINDS = ("plain", "chunked")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations inside a `with` block allocate.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self._known.setdefault(id(leaf.untyped_storage()), weakref.ref(leaf.untyped_storage()))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        known = self._known.get(key)
        if known is not None and known() is storage:
            return

        def freed(_: object) -> None:
            self.now -= size

        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def make_input(rows: int, vocabulary: int, hidden: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Return hidden states and the head's weight, which require gradients, and targets."""
    states = torch.randn(rows, hidden, dtype=dtype, device=device).requires_grad_()
    weight = torch.randn(vocabulary, hidden, dtype=dtype, device=device).mul_(hidden**-0.5).requires_grad_()
    return [states, weight, torch.zeros(rows, dtype=torch.int64, device=device)]


def run(kind: str, given: list[torch.Tensor], *, update: bool) -> list[torch.Tensor]:
    """Compute log-probabilities and entropies, and gradients in an update; return what remains."""
    states, weight, targets = given
    with torch.set_grad_enabled(update):
        if kind == "plain":
            found = token_log_probs(F.linear(states, weight), targets, 1.0, entropy_grad=update)
        else:
            found = head_log_probs([HeadTerm(states, weight)], None, targets, 1.0, entropy_grad=update)
        log_probs, entropy, _ = found
        if not update:
            return [log_probs, entropy]
        return list(torch.autograd.grad((log_probs + entropy).sum(), (states, weight)))


def peak_bytes(
    kind: str, *, rows: int, vocabulary: int, hidden: int, dtype: torch.dtype = torch.float32, update: bool = True
) -> int:
    """Return the largest number of bytes that a pass needs beyond its input and its results."""
    given = make_input(rows, vocabulary, hidden, dtype, "meta")
    with LiveBytes() as counted:
        remaining = run(kind, given, update=update)
    return counted.peak - sum(tensor.untyped_storage().nbytes() for tensor in remaining)


def seconds(options: argparse.Namespace, *, update: bool) -> dict[str, list[float]]:
    """Return the seconds of each round, after one that warms up."""
    given = make_input(options.timed_rows, options.vocabulary, options.hidden, torch.float32, "cpu")
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(options.rounds + 1):
        for kind, times in taken.items():
            started = time.perf_counter()
            run(kind, given, update=update)
            if number:
                times.append(time.perf_counter() - started)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16_384, help="response tokens of a micro-batch, for the memory")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--timed-rows", type=int, default=256, help="response tokens, for the time")
    parser.add_argument("--rounds", type=int, default=3)
    tables.add_write_option(parser)
    options = parser.parse_args()
    print(machine.header(), flush=True)
    shape = {"rows": options.rows, "vocabulary": options.vocabulary, "hidden": options.hidden}
    rows = []
    for name, update in (("log-probabilities", False), ("update", True)):
        peaks = {
            dtype: {kind: peak_bytes(kind, dtype=dtype, update=update, **shape) for kind in KINDS}
            for dtype in (torch.float32, torch.bfloat16)
        }
        taken = seconds(options, update=update)
        ratios = sorted(one / other for one, other in zip(taken["chunked"], taken["plain"], strict=True))
        times = " ".join(f"{statistics.median(taken[kind]):.2f}" for kind in KINDS)
        for dtype, peak in peaks.items():
            exact = dtype == torch.float32
            rows.append(
                [
                    name,
                    str(dtype).removeprefix("torch."),
                    *(format_bytes(peak[kind]) for kind in KINDS),
                    f"**{peak['chunked'] / peak['plain']:.3f}**",
                    times if exact else "",
                    f"**{statistics.median(ratios):.2f}** ({ratios[0]:.2f} to {ratios[-1]:.2f})" if exact else "",
                ]
            )
            print(*rows[-1], sep="  ", flush=True)
    head = ["pass", "dtype", "memory with logits", "in tiles", "ratio", "time with logits, in tiles, s", "ratio"]
    text = "\n\n".join(
        [
            f"{tables.caption('python benchmarks/log_prob_head.py')} Memory for {options.rows} tokens, time for "
            f"{options.timed_rows}; vocabulary {options.vocabulary}, hidden size {options.hidden}.",
            tables.markdown(head, rows),
        ]
    )
    print(f"\n{text}")
    if options.write:
        tables.write_section(options.write, "log_prob_head", text)


if __name__ == "__main__":
    main()
