"""Helpers without knowledge of a run: files, data, models, devices, tracking.

`hf_tokenizer` and `hf_processor` are imported on access, because this package must not import transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from verl.extension.upstream_names import missing_names

if TYPE_CHECKING:
    from verl.utils.tokenizer import hf_processor, hf_tokenizer

__all__ = ["hf_processor", "hf_tokenizer"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("verl.utils.tokenizer"), name)
    return missing_names(__name__)(name)
