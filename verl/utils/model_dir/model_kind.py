"""The kind of a model by its config.json: one that generates text, or one that classifies it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from verl.utils.model_dir.model_files import ModelFiles

_GENERATORS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_CLASSIFIER = "ForSequenceClassification"


def model_kind(config: Mapping[str, Any]) -> Literal["generator", "classifier"] | None:
    """Return the kind of the first entry of `architectures`; None for another one, or without an entry."""
    first = architecture(config)
    if first.endswith(_CLASSIFIER):
        return "classifier"
    return "generator" if first.endswith(_GENERATORS) else None


def architecture(config: Mapping[str, Any]) -> str:
    """Return the first entry of `architectures`; empty without one."""
    return str(next(iter(config.get("architectures") or ()), ""))


def label_count(files: ModelFiles) -> int:
    """Return the number of labels of a classifier: rows of its head, else as transformers reads its config.json."""
    head = files.shapes.get("score.weight")
    if head is not None:
        return head[0]
    labels = files.whole_config.get("id2label")
    return len(labels) if isinstance(labels, Mapping) else int(files.whole_config.get("num_labels") or 2)
