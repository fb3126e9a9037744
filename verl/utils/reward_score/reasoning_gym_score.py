"""Scorer of reasoning-gym tasks (https://github.com/open-thought/reasoning-gym), which calls the scorer of the task."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any


def compute_score(task: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None) -> float:
    """Return the score of the task for the answer, in [0, 1].

    The answer is the content of the last `<answer>...</answer>` after the last `</think>`, else all text there, else
    (if there is none) the last `<answer>...</answer>` in the reasoning; stripped.

    Args:
        task: name of a task, such as `spell_backward`.
        solution_str: the response of the model.
        ground_truth: the answer of the task, used if the entry has none.
        extra_info: holds the item of the dataset: `entry` with `question`, `answer` and `metadata`, or these three keys
            directly. `entry` and `metadata` may be JSON text; in Parquet this avoids merging the fields of different
            rows.

    Raises:
        ValueError: unknown task, or invalid JSON text.
        ImportError: reasoning-gym is not installed.
    """
    return float(task_scorer(task)(extract_answer(solution_str), entry_of(ground_truth, extra_info)))


def extract_answer(solution_str: str) -> str:
    """Return the answer in the text of a model; see `compute_score`."""
    text = solution_str.rpartition("</think>")[2]
    inside = _last_tagged(text)
    if inside is None and not text.strip():
        inside = _last_tagged(solution_str)
    return (text if inside is None else inside).strip()


def _last_tagged(text: str) -> str | None:
    before, closing, _ = text.rpartition("</answer>")
    _, opening, inside = before.rpartition("<answer>")
    return inside if closing and opening else None


def entry_of(ground_truth: Any, extra_info: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the item of the dataset in the form that the scorer of the task expects; see `compute_score`."""
    info = extra_info or {}
    source = _decoded(info["entry"], "entry") if info.get("entry") is not None else info
    answer = source.get("answer")
    metadata = source.get("metadata")
    return {
        "question": source.get("question"),
        "answer": ground_truth if answer is None else answer,
        "metadata": {} if metadata is None else _decoded(metadata, "metadata"),
    }


def _decoded(value: Any, name: str) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"extra_info.{name} is not valid JSON ({error}); pass a dict or JSON text") from error
    if not isinstance(value, Mapping):
        raise ValueError(f"extra_info.{name} is of type {type(value).__name__}; pass a dict or JSON text")
    return value


@cache
def task_scorer(task: str) -> Callable[[str, dict[str, Any]], float]:
    """Return the `score_answer` of a task, cached; the first call imports all of reasoning-gym (about 1.3 s).

    Importing only the module of the task is not faster, because it imports the package first.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ImportError(
            f"data_source=reasoning_gym/{task} needs reasoning-gym: pip install reasoning-gym ({error})"
        ) from error
    if task not in DATASETS:
        known = ", ".join(sorted(DATASETS))
        raise ValueError(f"data_source=reasoning_gym/{task}: unknown task '{task}'; use one of {known}")
    return reasoning_gym.get_score_answer_fn(task)
