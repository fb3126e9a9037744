"""Write train.parquet from DAPO-Math-17k and test.parquet from AIME 2024, each question once.

    python3 examples/data_preprocess/dapo_17k.py                                    # downloads both from the hub
    python3 examples/data_preprocess/dapo_17k.py --local_dataset_path ~/raw/dapo    # files dapo*, train*; aime*, test*

The published training file contains each question about a hundred times, and AIME 2024 contains each of its 30
questions 32 times. Here one pass over the data (`trainer.total_epochs`) is one pass over the questions, and validation
samples each question `actor_rollout_ref.rollout.val_kwargs.n` times.
"""

import sys
from pathlib import Path
from typing import Any

from verl.utils.dataset.prepare import convert, make_parser, published_files, write_splits

TRAIN, TEST = "BytedTsinghua-SIA/DAPO-Math-17k", "BytedTsinghua-SIA/AIME-2024"
STARTS = {"train": ("dapo", "train"), "test": ("aime", "test")}


class Distinct:
    """Row converter that skips repeated questions; the published files already have verl's columns."""

    def __init__(self, split: str) -> None:
        self.split = split
        self._seen: set[str] = set()

    def __call__(self, example: dict[str, Any], index: int) -> dict[str, Any] | None:
        question = repr(example.get("prompt"))
        if question in self._seen:
            return None
        self._seen.add(question)
        reward_model, info = example.get("reward_model"), example.get("extra_info")
        if not isinstance(info, dict | None):
            raise ValueError(f"'extra_info' is a {type(info).__name__}; it must be a dict")
        return {
            "data_source": example.get("data_source"),
            "prompt": example.get("prompt"),
            "ability": example.get("ability") or "MATH",
            # Published styles name other scorers; here only the data source selects the scorer.
            "reward_model": {**reward_model, "style": "rule"} if isinstance(reward_model, dict) else reward_model,
            "extra_info": {**(info or {}), "split": self.split},
        }


def files_of(local: str | None) -> dict[str, list[Path]]:
    """Find the files of both splits; in a local path, of the splits that it has."""
    if local is not None:
        return published_files(local, TRAIN, folder="data", splits=STARTS)
    return {
        split: published_files(None, repo, folder="data", splits={split: STARTS[split]})[split]
        for split, repo in (("train", TRAIN), ("test", TEST))
    }


def main(arguments: list[str] | None = None) -> None:
    given = make_parser(__doc__, "~/data/dapo").parse_args(arguments)
    try:
        files = files_of(given.local_dataset_path)
        write_splits(given.local_save_dir, {split: convert(paths, Distinct(split)) for split, paths in files.items()})
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        sys.exit(f"dapo_17k.py: {error}")


if __name__ == "__main__":
    main()
