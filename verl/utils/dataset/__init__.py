"""Prompts from data files: `files` reads, `prompts` tokenizes, `rl_dataset` is the dataset, `loader` makes batches.

`RLHFDataset` and `collate_fn` are imported on access, because `files` must work without torch and transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn

__all__ = ["RLHFDataset", "collate_fn"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("verl.utils.dataset.rl_dataset"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
