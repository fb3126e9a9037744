"""The garbage collector of processes that live long and load large libraries."""

from __future__ import annotations

import gc


def freeze_heap() -> None:
    """Leave what exists now out of every later collection; for the end of a process's start.

    Modules of torch, vLLM and transformers are some 400,000 objects. A full collection walks them all, some 0.2 s in
    which the process does nothing else, and each step of a run makes enough objects for one.
    """
    gc.collect()
    gc.freeze()
