"""Write train.parquet and test.parquet from GSM8K (openai/gsm8k): grade-school word problems with numbers as answers.

python3 examples/data_preprocess/gsm8k.py                                     # downloads from the hub
python3 examples/data_preprocess/gsm8k.py --local_dataset_path ~/raw/gsm8k    # files train* and test*
"""

import sys
from typing import Any

from verl.utils.dataset.prepare import convert, make_parser, make_row, published_files, text_of, write_splits
from verl.utils.reward_score.gsm8k import extract_answer

SOURCE = "openai/gsm8k"
# The scorer reads the number after the last ####.
INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
SPLITS = {"train": ("train",), "test": ("test",)}


def row(example: dict[str, Any], split: str, index: int) -> dict[str, Any]:
    """Convert a published row {question, answer}, whose answer ends in `#### <number>`, to verl's columns."""
    question, solution = text_of(example, "question"), text_of(example, "answer")
    answer = extract_answer(solution)
    if answer is None:
        raise ValueError(f"'answer' must end in #### and a number: ...{solution[-60:]!r}")
    return make_row(
        f"{question} {INSTRUCTION}",
        f"{answer:f}",
        data_source=SOURCE,
        ability="math",
        extra_info={"split": split, "index": index, "answer": solution, "question": question},
    )


def main(arguments: list[str] | None = None) -> None:
    given = make_parser(__doc__, "~/data/gsm8k").parse_args(arguments)
    try:
        files = published_files(given.local_dataset_path, SOURCE, folder="main", splits=SPLITS)
        made = {
            split: convert(paths, lambda example, index, split=split: row(example, split, index))
            for split, paths in files.items()
        }
        write_splits(given.local_save_dir, made)
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        sys.exit(f"gsm8k.py: {error}")


if __name__ == "__main__":
    main()
