"""Tasks of reasoning-gym (https://github.com/open-thought/reasoning-gym), scored by the task's own scorer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any


def compute_score(task: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None) -> float:
    """The score in [0, 1] that the task gives to the answer.

    The answer is what the last `<answer>...</answer>` holds, else the whole text behind the last `</think>`, stripped.

    Args:
        task: a task's name, such as `spell_backward`.
        solution_str: the model's answer.
        ground_truth: the task's own answer, used where the entry has none.
        extra_info: holds the dataset's item: `entry` with `question`, `answer` and `metadata`, or these three directly.
            `entry` and `metadata` may be JSON text, which keeps parquet from mixing the fields of unlike rows.

    Raises:
        ValueError: no such task, or JSON text that does not parse.
        ImportError: reasoning-gym is not installed.
    """
    return float(task_scorer(task)(extract_answer(solution_str), entry_of(ground_truth, extra_info)))


def extract_answer(solution_str: str) -> str:
    """The answer in a model's text; see `compute_score`."""
    text = solution_str.rpartition("</think>")[2]
    before, closing, _ = text.rpartition("</answer>")
    _, opening, inside = before.rpartition("<answer>")
    return (inside if closing and opening else text).strip()


def entry_of(ground_truth: Any, extra_info: Mapping[str, Any] | None) -> dict[str, Any]:
    """The dataset item that a row was made from, as its scorer wants it; see `compute_score`."""
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
            raise ValueError(f"extra_info.{name} is text that is not JSON ({error}); give a dict or JSON") from error
    if not isinstance(value, Mapping):
        raise ValueError(f"extra_info.{name} is of type {type(value).__name__}; give a dict or JSON text")
    return value


@cache
def task_scorer(task: str) -> Callable[[str, dict[str, Any]], float]:
    """The task's `score_answer`, made once; the first call imports the whole of reasoning-gym (about 1.3 s).

    Importing one task's module would be no quicker, since it imports the package first.
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
        raise ValueError(f"data_source=reasoning_gym/{task}: reasoning-gym has no task '{task}'; it has {known}")
    return reasoning_gym.get_score_answer_fn(task)
