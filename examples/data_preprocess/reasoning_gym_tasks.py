"""Write train.parquet and test.parquet from reasoning-gym tasks, which generate and score their own questions.

    python3 examples/data_preprocess/reasoning_gym_tasks.py --tasks chain_sum,spell_backward --train_size 2000
    python3 examples/data_preprocess/reasoning_gym_tasks.py --tasks chain_sum --task_config '{"min_digits": 2}'

No question of test.parquet is in train.parquet. The same options give the same rows. (A script named reasoning_gym.py
would hide the library.)
"""

import argparse
import json
import sys
from typing import Any

from verl.extension.user_files import check_unique
from verl.utils.dataset.prepare import add_save_dir, check_row, make_row, row_count, write_splits
from verl.utils.reward_score import GYM_PREFIX

INSTRUCTION = "Think step by step, and give the final answer between <answer> and </answer>."


def row(task: str, entry: dict[str, Any], split: str, index: int) -> dict[str, Any]:
    """Convert an item {question, answer, metadata} to verl's columns; the scorer gets the full item as JSON."""
    return make_row(
        f"{entry['question']}\n\n{INSTRUCTION}",
        # Some tasks accept many answers and name none; their scorers read only the item.
        "(any)" if entry["answer"] is None else str(entry["answer"]),
        data_source=f"{GYM_PREFIX}{task}",
        ability="reasoning",
        extra_info={"split": split, "index": index, "entry": json.dumps(entry, sort_keys=True, default=str)},
    )


def distinct_items(task: str, count: int, seed: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return `count` items of a task with different questions.

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: the task is unknown, does not accept the settings, or has fewer than `count` different questions.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(f"reasoning-gym is not installed: pip install reasoning-gym ({error})") from error
    try:
        # Twice as many as needed, because small tasks repeat questions.
        items = reasoning_gym.create_dataset(task, size=2 * count, seed=seed, **settings)
        different = {entry["question"]: dict(entry) for entry in items}
    except (AssertionError, TypeError) as error:
        raise ValueError(f"--task_config={settings}: {task} does not accept these settings ({error})") from error
    if len(different) < count:
        raise ValueError(
            f"--tasks={task}: {2 * count} items have only {len(different)} different questions, {count} are needed: "
            "reduce --train_size and --test_size, or enlarge the task with --task_config"
        )
    return list(different.values())[:count]


def options() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    made.add_argument(
        "--tasks", required=True, metavar="A,B", help="names of tasks; each has an equal share of the rows"
    )
    made.add_argument("--task_config", type=json.loads, default={}, metavar="JSON", help="settings of the tasks")
    made.add_argument(
        "--train_size", type=row_count, default=1000, metavar="ROWS", help="training rows per task (1000)"
    )
    made.add_argument("--test_size", type=row_count, default=100, metavar="ROWS", help="test rows per task (100)")
    made.add_argument("--seed", type=int, default=1, help="seed of the tasks (1)")
    add_save_dir(made, "~/data/reasoning_gym")
    return made


def main(arguments: list[str] | None = None) -> None:
    given = options().parse_args(arguments)
    splits: dict[str, list[dict[str, Any]]] = {"test": [], "train": []}
    try:
        tasks = given.tasks.split(",")
        check_unique(tasks, f"--tasks={given.tasks}")
        for task in tasks:
            items = distinct_items(task, given.train_size + given.test_size, given.seed, given.task_config)
            for split, part in (("test", items[: given.test_size]), ("train", items[given.test_size :])):
                splits[split] += [row(task, entry, split, len(splits[split]) + i) for i, entry in enumerate(part)]
        for each in splits["train"] + splits["test"]:
            check_row(each)
        write_splits(given.local_save_dir, splits)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"reasoning_gym_tasks.py: {error}")


if __name__ == "__main__":
    main()
